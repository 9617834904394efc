"""How far the next-token distributions of a compressed model are from those of its base, on held-out text.

    kl = mean over scored tokens of  sum over v of p(v) (log p(v) - log q(v)),    p of the base, q of the compressed

It is the forward divergence, in nat, read in the same pass as the perplexity. A model can lose and win answers, or be
flattered by a flatter distribution, and keep its scores; it cannot keep its distributions. Neither number says whether
a model became worse, only that it became another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.metrics.registry import metric
from bench.results.items import Items
from bench.results.row import Input

if TYPE_CHECKING:
    import torch

ROWS = 128  # positions whose probabilities exist at once; their logits do already


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Sums over the scored tokens of each sample, in the order of the data."""

    kl: tuple[float, ...]  # nat
    agreed: tuple[float, ...]  # tokens whose most likely prediction is the base's
    tokens: tuple[int, ...]
    asked: tuple[str, ...] = ()  # hashes of the samples
    params: dict[str, Any] = field(default_factory=dict)  # of the perplexity that was read with it
    inputs: Mapping[str, Input] = field(default_factory=dict)  # and its text

    @property
    def of_itself(self) -> "Divergence":
        """That of the base from itself, by definition."""
        zeros, all_of_them = (0.0,) * len(self.tokens), tuple(map(float, self.tokens))
        return Divergence(kl=zeros, agreed=all_of_them, tokens=self.tokens, asked=self.asked, params=self.params,
                          inputs=self.inputs)  # fmt: skip

    @property
    def items(self) -> dict[str, Items]:
        """Both metrics by sample."""
        return {
            name: Items(self.asked, shares(sums, self.tokens), "real")
            for name, sums in (("quality.kl_to_base", self.kl), ("quality.top1_agreement", self.agreed))
        }


def shares(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, ...]:
    """What each sample adds to the mean over all tokens, times the number of samples: their mean is that mean.

    Where all samples have as many tokens these are the samples' own means.

    >>> shares([1.0, 6.0], [1, 3])
    (0.5, 3.0)
    """
    total = sum(tokens)
    return tuple(each * len(sums) / total for each in sums)


@metric(
    "quality.kl_to_base", unit="nat/token", better="lower", kind="deterministic", of="divergence", rel=0.02, floor=1e-5
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
)
def top1_agreement(divergence: Divergence) -> float:
    """Share of tokens before which both models hold the same token for the most likely.

    >>> top1_agreement(Divergence(kl=(0.5, 1.0), agreed=(2.0, 1.0), tokens=(2, 4)))
    0.5
    """
    return sum(divergence.agreed) / sum(divergence.tokens)


def diverge(base: "torch.Tensor", other: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Divergence of `other` from `base` in nat, and whether both have one most likely token: (positions,) each.

    Both are logits (positions, vocabulary) in fp32; probabilities exist for ROWS positions at a time.
    """
    import torch

    found = []
    for mine, theirs in zip(base.split(ROWS), other.split(ROWS), strict=True):
        p, q = mine.log_softmax(-1), theirs.log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found), base.argmax(-1) == other.argmax(-1)
