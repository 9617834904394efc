"""Rounds of generation by an engine, in the form of `measure.generation`, so that `Interleaved` runs two in turn."""

from itertools import pairwise
from typing import Any

from bench.measure.engines.engine import Engine
from bench.measure.generation import Load, Round, random_prompts


class EngineDecoder:
    """An engine under one load; the prompts are those of `generation.Decoder` with the same seed.

    Args:
        model: the model that the engine serves, whose operations are counted.
    """

    def __init__(self, engine: Engine, model: Any, load: Load, *, seed: int = 0):
        self.engine, self.model, self.load = engine, model, load
        self._prompts = random_prompts(load, model.config.vocab_size, seed).tolist()

    def run(self, index: int = 0) -> Round:
        """Generate once from prompt `index` modulo the number of prompts; of a batch the slowest sequence counts.

        Raises:
            EngineError: the engine fails.
        """
        prompts = self._prompts[index % len(self._prompts)]
        found = self.engine.generate(prompts, self.load.new_tokens, ignore_eos=True)
        stamps = [max(times) for times in zip(*(each.arrivals_s for each in found), strict=True)]
        return Round(
            ttft_s=stamps[0], prefill_s=None, steps_s=tuple(b - a for a, b in pairwise(stamps)), total_s=stamps[-1],
            kv_bytes=None, tokens=self.load.batch_size * self.load.new_tokens,
        )  # fmt: skip
