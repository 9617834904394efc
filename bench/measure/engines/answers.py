"""What an engine is opened with and asked, and what it answers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.errors import OptionError
from compression.files.strict_json import at_least

DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an engine opens a model.

    Attributes:
        dtype: of weights and activations that are not quantized. "auto" is the engine's choice, which `Facts.flags`
            tells: the checkpoint's dtype, but vLLM opens checkpoints of fp32 in 16 bits.
        threads: of the processor.
        max_length: tokens of a sequence, prompt and generated ones together.
        sequences: at once, at most.
        seed: of the engine's random numbers; those of sampled tokens have seeds of their own (`Drawn`).
        quantization: what the engine is told to make of the weights while it loads them; None for what the file has.
        devices: among which the engine divides one model, a process for each; on a CPU processes of `threads` each.
    """

    dtype: str = "auto"
    threads: int = 1
    max_length: int = 1024
    sequences: int = 1
    seed: int = 0
    quantization: str | None = None
    devices: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        for name, least in (("threads", 1), ("max_length", 2), ("sequences", 1), ("seed", 0), ("devices", 1)):
            at_least(name, getattr(self, name), least, OptionError)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an engine says of itself.

    Attributes:
        version: of the engine.
        torch, transformers: their versions in the engine's environment, None if it uses none.
        vocabulary: tokens that the model knows.
        flags: what the engine was opened with, and what follows from it.
        load_s: seconds from the request to the opened model, imports included.
        python: what runs it.
    """

    engine: str
    version: str
    torch: str | None
    transformers: str | None
    vocabulary: int
    flags: Mapping[str, Any]
    load_s: float
    python: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of one prompt, in nat.

    Attributes:
        logprobs: of every token after the first, given those before it.
        top: at each of these places the most likely tokens with their log-probabilities, the likeliest first.
    """

    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """How tokens are drawn: from the likeliest that reach `top_p` of the distribution at a temperature.

    The same request to the same version of an engine has the same answer.

    Attributes:
        seeds: of each prompt. transformers draws for all prompts of a request together, from the first of them.
    """

    temperature: float
    top_p: float = 1.0
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise OptionError(f"temperature must be above 0 and finite, not {self.temperature!r}; None is greedy")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        for seed in self.seeds:
            at_least("a seed", seed, 0, OptionError)


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What was generated for one prompt.

    Attributes:
        ids: the tokens; the last one is a stop token if one came.
        arrivals_s: seconds from the start of the request to each of them. The first is the time to first token, the
            differences are the decode steps.
    """

    ids: tuple[int, ...]
    arrivals_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Anonymous resident memory of an engine's process and of those that it started.

    Attributes:
        anonymous_bytes: now.
        peak_bytes: at most since the last reading, or since the start; of several processes the sum of their peaks.
        source: where the figures were read.
    """

    anonymous_bytes: int
    peak_bytes: int
    source: str
