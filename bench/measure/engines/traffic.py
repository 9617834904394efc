"""Requests that come at random times to an engine that takes them while it computes others.

The load is open: a request comes when its time is there, whether the others are answered or not. Times between requests
are exponential (a Poisson process), by the seed and the number of the round, so that every model has the same ones.
"""

import random
from dataclasses import dataclass
from itertools import accumulate

from bench.errors import OptionError
from bench.measure.engines.engine import Engine
from bench.measure.generation import Load, random_prompts
from compression.files.strict_json import at_least


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What comes in a round.

    Attributes:
        rate: requests per second, on average.
        requests: of a round.
        prompt_tokens, new_tokens: of each request; the end-of-sequence token is ignored.
    """

    rate: float
    requests: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise OptionError(f"a request rate must be above 0 and finite, not {self.rate!r}")
        at_least("requests", self.requests, 1, OptionError)

    def arrivals(self, seed: int, index: int) -> list[float]:
        """Seconds at which the requests of a round come; the first at once."""
        gap = random.Random(f"{seed}/{index}").expovariate
        return list(accumulate((gap(self.rate) for _ in range(self.requests - 1)), initial=0.0))


@dataclass(frozen=True, kw_only=True)
class TrafficRound:
    """What became of the requests of a round.

    Attributes:
        ttft_s: of each request from its arrival to its first token, waiting included.
        steps_s: of each request the mean time between two tokens.
        total_s: from the first arrival to the last token.
        tokens: generated, of all requests.
    """

    ttft_s: tuple[float, ...]
    steps_s: tuple[float, ...]
    total_s: float
    tokens: int


class TrafficServer:
    """An engine under traffic, in the form of `measure.generation`, so that `Interleaved` runs two in turn."""

    def __init__(self, engine: Engine, vocabulary: int, traffic: Traffic, *, seed: int = 0):
        self.engine, self.traffic, self.seed = engine, traffic, seed
        load = Load(batch_size=traffic.requests, prompt_tokens=traffic.prompt_tokens, new_tokens=traffic.new_tokens)
        self._prompts = random_prompts(load, vocabulary, seed).tolist()

    def run(self, index: int = 0) -> TrafficRound:
        """Serve the requests of a round.

        Raises:
            EngineError: the engine fails.
        """
        traffic, prompts = self.traffic, self._prompts[index % len(self._prompts)]
        arrivals = traffic.arrivals(self.seed, index)
        found = self.engine.arrive(prompts, arrivals, traffic.new_tokens)
        times: list[tuple[float, ...]] = [each.arrivals_s for each in found]
        return TrafficRound(
            ttft_s=tuple(each[0] - arrival for each, arrival in zip(times, arrivals, strict=True)),
            steps_s=tuple((each[-1] - each[0]) / (len(each) - 1) for each in times),
            total_s=max(each[-1] for each in times), tokens=traffic.requests * traffic.new_tokens,
        )  # fmt: skip
