"""Perplexity, and divergence from the base, of what an engine serves, by the log-probabilities that it gives.

The samples and the tokens that are scored are those of `measure.perplexity`. Of a distribution an engine gives the
likeliest tokens, not all. The divergence is then that of distributions in which every token that is not among the
likeliest of both is one token, the tail:

    sum over v in both of p(v) (log p(v) - log q(v))  +  P (log P - log Q),    P, Q the rest of p and q

It is at most the divergence itself (log-sum inequality), which it nears as the tail vanishes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.data.sources import Data
from bench.errors import MetricError, NotAvailable
from bench.measure.divergence import Divergence
from bench.measure.engines.engine import Engine, Scores
from bench.measure.perplexity import PerplexityReading, checked_samples, reading_of
from bench.measure.perplexity_windows import PerplexityProtocol, Sample

TOP = 20  # tokens at each place, or all that there are
_REST = 1e-12  # the least that a tail is taken for: what is printed in fp32 adds up to a little more than 1

Top = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class ServedDivergence(Divergence):
    """A divergence by the likeliest tokens.

    Attributes:
        tail: mean share of the base's distribution that is in the tail.
        top: how many tokens are known at each place.
    """

    tail: float = 0.0
    top: int = TOP

    @property
    def remark(self) -> str:
        """What a reader of the value has to know."""
        return (
            f"at least this much: the {self.top} likeliest tokens at each place, and all others as one, which hold "
            f"{self.tail:.2%} of the base's probability"
        )


class Likelihoods:
    """Log-probabilities of samples by one engine, taken once.

    Attributes:
        samples: what was read.
        top: tokens that are known at each place.
        scores: of each sample.
    """

    def __init__(
        self,
        engine: Engine,
        config: Any,
        tokenizer: Any,
        data: Data,
        protocol: PerplexityProtocol,
        template: Mapping[str, Any] | None = None,
        *,
        spare: int = 0,
    ):
        self._data, self._protocol = data, protocol
        self.samples = checked_samples(config, tokenizer, data, protocol, template)
        longest, most = max(len(each.ids) for each in self.samples), engine.options.max_length - spare
        if longest > most:
            raise NotAvailable(f"the engine scores at most {most} tokens at once, and a sample has {longest}; give "
                               f"--length {most} or less")  # fmt: skip
        self.top = min(TOP, engine.facts.vocabulary)
        self.scores = [engine.logprobs([list(each.ids)], top=self.top)[0] for each in self.samples]

    def reading(self, base: "Likelihoods | None" = None) -> PerplexityReading:
        """The perplexity; beside a base with the divergence from it.

        Raises:
            MetricError: a log-probability is not finite.
        """
        sums = [-math.fsum(of.logprobs[each.first_scored - 1 :])
                for each, of in zip(self.samples, self.scores, strict=True)]  # fmt: skip
        for place, nll in enumerate(sums):
            if not math.isfinite(nll):
                raise MetricError(f"the loss of sample {place + 1} of {len(sums)} is {nll}")
        found = reading_of(self.samples, sums, self._data, self._protocol, 1)
        return found if base is None else replace(found, divergence=self._divergence(base, found))

    def _divergence(self, base: "Likelihoods", reading: PerplexityReading) -> Divergence:
        kl, agreed, tails = [], [], []
        for sample, own, others in zip(self.samples, self.scores, base.scores, strict=True):
            places = [diverge(p, q) for p, q in zip(_scored(sample, others), _scored(sample, own), strict=True)]
            kl.append(math.fsum(each.kl for each in places))
            agreed.append(float(sum(each.agreed for each in places)))
            tails.append(math.fsum(each.tail for each in places))
        return ServedDivergence(
            kl=tuple(kl), agreed=tuple(agreed), tokens=reading.sample_tokens, asked=reading.asked,
            params=reading.params | {"top": self.top}, inputs=reading.inputs, tail=math.fsum(tails) / reading.tokens,
            top=self.top,
        )  # fmt: skip


def _scored(sample: Sample, scores: Scores) -> Sequence[Top]:
    return scores.top[sample.first_scored - 1 :]


@dataclass(frozen=True)
class Place:
    """How two distributions differ at one place: see the module; `tail` is P."""

    kl: float
    agreed: bool
    tail: float


def diverge(base: Top, other: Top) -> Place:
    """Of the likeliest tokens with their log-probabilities, the likeliest first.

    >>> round(diverge([(0, math.log(0.75)), (1, math.log(0.25))], [(0, math.log(0.5)), (1, math.log(0.5))]).kl, 4)
    0.1308
    """
    q = dict(other)
    both = [(log_p, q[token]) for token, log_p in base if token in q]
    rest = max(_REST, 1 - math.fsum(math.exp(log_p) for log_p, _ in both))
    rest_of_other = max(_REST, 1 - math.fsum(math.exp(log_q) for _, log_q in both))
    known = math.fsum(math.exp(log_p) * (log_p - log_q) for log_p, log_q in both)
    return Place(
        kl=max(0.0, known + rest * (math.log(rest) - math.log(rest_of_other))), agreed=base[0][0] == other[0][0],
        tail=rest,
    )  # fmt: skip
