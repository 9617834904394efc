"""How far the next-token distributions of a compressed model are from those of its base, on held-out text.

    kl = mean over scored tokens of  sum over v of p(v) (log p(v) - log q(v)),    p of the base, q of the compressed

It is the forward divergence, in nat, read in the same pass as the perplexity. A model can lose and win answers, or be
flattered by a flatter distribution, and keep its scores; it cannot keep its distributions. Neither number says whether
a model became worse, only that it became another.
"""

from typing import TYPE_CHECKING

from bench.measure.divergence import Divergence
from bench.metrics.registry import metric

if TYPE_CHECKING:
    pass


@metric(
    "quality.kl_to_base",
    unit="nat/token",
    better="lower",
    kind="deterministic",
    of="divergence",
    rel=0.02,
    floor=1e-5,
    dtype_floor=2e-3,  # rounding of activations in bf16; see docs/methodology/compute-dtype.md
)
def kl_to_base(divergence: Divergence) -> float:
    """Mean divergence of the next-token distributions from the base's.

    >>> kl_to_base(Divergence(kl=(0.5, 1.0), agreed=(2.0, 4.0), tokens=(2, 4)))
    0.25
    """
    return sum(divergence.kl) / sum(divergence.tokens)


@metric(
    "quality.top1_agreement",
    unit="fraction",
    better="higher",
    kind="deterministic",
    of="divergence",
    rel=0.005,
    floor=2e-4,
    dtype_floor=0.02,  # as above
)
def top1_agreement(divergence: Divergence) -> float:
    """Share of tokens before which both models hold the same token for the most likely.

    >>> top1_agreement(Divergence(kl=(0.5, 1.0), agreed=(2.0, 1.0), tokens=(2, 4)))
    0.5
    """
    return sum(divergence.agreed) / sum(divergence.tokens)
