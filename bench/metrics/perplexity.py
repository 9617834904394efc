"""How well a model predicts text: perplexity, the exponential of the mean negative log-likelihood per token.

    nll = sum over scored tokens t of -log p(t | tokens before t in the same sample);   perplexity = exp(nll / tokens)

`bench.measure.perplexity` says how it is measured, and under which protocols.
"""

from typing import TYPE_CHECKING

from bench.measure.perplexity import PerplexityReading
from bench.metrics.registry import metric

if TYPE_CHECKING:
    pass


@metric(
    "quality.perplexity",
    unit="perplexity",
    better="lower",
    kind="deterministic",
    of="perplexity",
    rel=0.005,
    of_items="exp",
)
def perplexity_of(reading: PerplexityReading) -> float:
    """exp of the mean negative log-likelihood per token (SPEC section 4; E-JUST, table 4).

    A model that gives each of four tokens the probability 1/8 has perplexity 8:

    >>> import math
    >>> from bench.measure.perplexity_windows import PerplexityProtocol
    >>> four = PerplexityReading(nll=4 * math.log(8), tokens=4, sample_means=(math.log(8),), bits_per_byte=None,
    ...     truncated=0, batch_size=1, data="doctest", digest="", protocol=PerplexityProtocol())
    >>> round(perplexity_of(four), 6)
    8.0
    """
    return reading.perplexity


@metric("quality.nll", unit="nat/token", better="lower", kind="deterministic", of="perplexity", rel=0.002)
def nll_of(reading: PerplexityReading) -> float:
    """Mean negative log-likelihood per token: the logarithm of `quality.perplexity`.

    >>> import math
    >>> from bench.measure.perplexity_windows import PerplexityProtocol
    >>> four = PerplexityReading(nll=4 * math.log(8), tokens=4, sample_means=(math.log(8),), bits_per_byte=None,
    ...     truncated=0, batch_size=1, data="doctest", digest="", protocol=PerplexityProtocol())
    >>> round(nll_of(four), 4)
    2.0794
    """
    return reading.mean_nll
