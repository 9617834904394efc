"""An engine that serves one checkpoint in a process of its own: log-probabilities, generation, memory."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from bench.errors import EngineError, OptionError
from bench.measure.engines.answers import Continuation, Drawn, Facts, Memory, Options, Scores
from bench.measure.engines.child import Child
from bench.measure.engines.environments import ENGINES, check_installed, environment_of, python_of, requirement
from compression.files.strict_json import at_least

PATIENCE_S = 1800.0  # for one answer
ABOVE_ZERO = 1e-3  # nat; a log-probability that was rounded may be above 0 by some of the last digits of fp32
_PROCESSES = Path(__file__).with_name("processes")

Ids = Sequence[int]


class Engine:
    """A model that is opened by an engine; a context manager, which ends the process and whatever it started.

    Attributes:
        facts: what the engine says of itself.
        options: what it was opened with.
        log: the file with all that it and its libraries wrote.
    """

    def __init__(self, child: Child, model: Path | str, options: Options, python: Path | str):
        self.options, self.log, self._child = options, child.log, child
        given = {name: value for name, value in asdict(options).items() if value is not None}
        if options.devices == 1:
            del given["devices"]  # known to those alone that divide models
        answer = child.ask({"model": str(model)} | given)
        try:
            self.facts = Facts(**answer, python=str(python))
            if not (isinstance(self.facts.vocabulary, int) and math.isfinite(self.facts.load_s)):
                raise TypeError("vocabulary must be a whole number, and load_s a time")
        except TypeError as error:
            raise self._wrong(f"facts of itself, but: {error}") from None

    @property
    def pid(self) -> int:
        """Of the engine's process, which is the first of its group."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked; one that was killed, or was ended for a wrong answer, has to be started again."""
        return self._child.alive

    @classmethod
    def start(
        cls,
        name: str,
        model: Path | str,
        *,
        log: Path,
        python: Path | str | None = None,
        options: Options | None = None,
        patience_s: float = PATIENCE_S,
        script: Path | None = None,
    ) -> Self:
        """Open a model.

        Args:
            name: of the engine, one of `environments.ENGINES`.
            model: a checkpoint's folder, or a .gguf file for llama.cpp.
            log: a file for all that the engine writes, begun anew.
            python: of the engine's environment; default that of `environments.python_of`.
            options: how it is opened.
            patience_s: seconds that one answer may take, also that of opening.
            script: the file that the Python runs; default the engine's own.

        Raises:
            OptionError: there is no engine of that name, or it quantizes nothing while it loads.
            EngineError: the engine is not installed there, cannot open the model, ends, or takes too long.
        """
        need, options = requirement(name), options or Options()
        if options.quantization is not None and not need.quantizes:
            raise OptionError(f"quantization must be None for {name}, not {options.quantization!r}: it opens weights "
                              "as they are stored")  # fmt: skip
        if options.devices > 1 and not need.divides:
            able = ", ".join(each for each, other in ENGINES.items() if other.divides)
            raise OptionError(f"devices must be 1 for {name}, not {options.devices}: models are divided by {able}")
        if python is None:
            python = python_of(name)
        else:
            check_installed(name, python)
        child = Child(
            f"the process of {name}", [str(python), str(script or _PROCESSES / need.script)],
            environment=environment_of(python), log=log, patience_s=patience_s,
        )  # fmt: skip
        try:
            return cls(child, model, options, python)
        except BaseException:
            child.close()
            raise

    def logprobs(self, prompts: Sequence[Ids], top: int = 0) -> tuple[Scores, ...]:
        """Log-probabilities of prompts of at least two tokens, with the `top` most likely tokens at each place.

        Raises:
            OptionError: the engine cannot be asked this.
            EngineError: it fails, or its answer is not one to this.
        """
        at_least("top", top, 0, OptionError)
        asked = self._checked(prompts, 2, 0)
        answer = self._child.ask({"op": "logprobs", "prompts": asked, "top": top})
        return tuple(self._scores(prompt, each, top) for prompt, each in self._each(answer, "scores", asked))

    def generate(
        self,
        prompts: Sequence[Ids],
        new_tokens: int,
        *,
        stop_ids: Ids = (),
        ignore_eos: bool = False,
        sampling: Drawn | None = None,
    ) -> tuple[Continuation, ...]:
        """Continuations of prompts that are submitted at once.

        Args:
            prompts: at most as many as the engine was opened for.
            new_tokens: for each prompt, at most.
            stop_ids: tokens that end a sequence, and belong to it.
            ignore_eos: whether `stop_ids` end nothing, so that all sequences have `new_tokens`.
            sampling: how tokens are drawn; None is greedy.

        Raises:
            OptionError: the engine cannot be asked this.
            EngineError: it fails, or its answer is not one to this.
        """
        at_least("new_tokens", new_tokens, 1, OptionError)
        asked, stops = self._checked(prompts, 1, new_tokens), self._ids(stop_ids)
        if len(asked) > self.options.sequences:
            raise OptionError(
                f"a batch must have at most {self.options.sequences} prompts, not {len(asked)}. Open the engine with "
                "more sequences"
            )
        if sampling is not None and len(sampling.seeds) != len(asked):
            raise OptionError(f"sampling must have a seed for each of {len(asked)} prompts, not {len(sampling.seeds)}")
        request = {"op": "generate", "prompts": asked, "new_tokens": new_tokens, "stop_ids": stops}
        drawn = None if sampling is None else asdict(sampling)
        answer = self._child.ask(request | {"ignore_eos": ignore_eos, "sampling": drawn})
        ends = frozenset() if ignore_eos else frozenset(stops)
        return tuple(
            self._sequence(prompt, each, new_tokens, ends) for prompt, each in self._each(answer, "sequences", asked)
        )

    def arrive(self, prompts: Sequence[Ids], arrivals_s: Sequence[float], new_tokens: int) -> tuple[Continuation, ...]:
        """Greedy continuations, all of `new_tokens`, of prompts that are submitted one by one.

        Args:
            prompts: as many as wanted; those that find no place among the `sequences` wait for one.
            arrivals_s: of each prompt, seconds from the start of the request, in order. The times of tokens are counted
                from there too.

        Raises:
            OptionError: the engine cannot be asked this.
            EngineError: it fails, or its answer is not one to this.
        """
        at_least("new_tokens", new_tokens, 1, OptionError)
        asked, arrivals = self._checked(prompts, 1, new_tokens), list(map(float, arrivals_s))
        if (
            len(arrivals) != len(asked)
            or arrivals != sorted(arrivals)
            or not 0 <= arrivals[0] <= arrivals[-1] < math.inf
        ):
            raise OptionError(
                f"arrivals_s must be a time for each of {len(asked)} prompts, in order, not {arrivals[:20]}"
            )
        answer = self._child.ask({"op": "arrive", "prompts": asked, "arrivals_s": arrivals, "new_tokens": new_tokens})
        found = tuple(
            self._sequence(prompt, each, new_tokens, frozenset())
            for prompt, each in self._each(answer, "sequences", asked)
        )
        for arrival, each in zip(arrivals, found, strict=True):
            if each.arrivals_s[0] < arrival:
                raise self._wrong(f"behind the arrival of a prompt at {arrival} s, but gave {each.arrivals_s[:20]}")
        return found

    def memory(self) -> Memory:
        """Memory now and at most since the last reading; where the engine sets memory aside, all of that counts."""
        answer = self._child.ask({"op": "memory"})
        try:
            found = Memory(**answer)
            if not 0 < found.anonymous_bytes <= found.peak_bytes:
                raise TypeError(f"{found.anonymous_bytes} bytes now and a peak of {found.peak_bytes}")
        except TypeError as error:
            raise self._wrong(f"bytes above 0 and a peak at least as high, but: {error}") from None
        return found

    def close(self) -> None:
        """End the process and whatever it started."""
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ids(self, ids: Ids) -> list[int]:
        found = [int(id) for id in ids]
        if wrong := [id for id in found if not 0 <= id < self.facts.vocabulary]:
            raise OptionError(f"a token must be from 0 to {self.facts.vocabulary - 1}, not {wrong[0]}")
        return found

    def _checked(self, prompts: Sequence[Ids], least: int, new_tokens: int) -> list[list[int]]:
        """The prompts as JSON knows them."""
        found = [self._ids(prompt) for prompt in prompts]
        at_least("the number of prompts", len(found), 1, OptionError)
        for prompt in found:
            at_least("the length of a prompt", len(prompt), least, OptionError)
            if len(prompt) + new_tokens > self.options.max_length:
                raise OptionError(
                    f"a sequence must have at most {self.options.max_length} tokens, not {len(prompt)} and "
                    f"{new_tokens} new ones. Open the engine with a larger max_length"
                )
        return found

    def _wrong(self, what: str) -> EngineError:
        self.close()
        return EngineError(f"{self._child.what} must answer {what}. Its log is in {self.log}")

    def _each(self, answer: dict[str, Any], key: str, asked: list[list[int]]) -> list[tuple[list[int], Any]]:
        """Each prompt with its part of the answer."""
        found = answer.get(key)
        if not isinstance(found, list) or len(found) != len(asked):
            count = len(found) if isinstance(found, list) else "no"
            raise self._wrong(f"{len(asked)} {key}, but gave {count}")
        return list(zip(asked, found, strict=True))

    def _scores(self, prompt: list[int], given: Any, top: int) -> Scores:
        try:
            tokens, values = given["tokens"], tuple(map(float, given["logprobs"]))
            best = tuple(tuple((int(id), float(value)) for id, value in row) for row in given["top"])
        except (TypeError, ValueError, LookupError) as error:
            raise self._wrong(f"tokens, logprobs and top, but: {type(error).__name__}: {error}") from None
        if tokens != prompt:
            raise self._wrong(f"for the {len(prompt)} tokens that it was asked, but computed {len(tokens)} other ones")
        if len(values) != len(prompt) - 1 or len(best) != len(values) or {len(row) for row in best} != {top}:
            raise self._wrong(
                f"{len(prompt) - 1} log-probabilities with {top} tokens each, but gave {len(values)} with "
                f"{sorted({len(row) for row in best})}"
            )
        if wrong := [x for x in (*values, *(x for row in best for _, x in row)) if not -math.inf < x <= ABOVE_ZERO]:
            raise self._wrong(f"finite log-probabilities of at most 0, but gave {wrong[0]}")
        return Scores(logprobs=values, top=best)

    def _sequence(self, prompt: list[int], given: Any, new_tokens: int, stops: frozenset[int]) -> Continuation:
        try:
            echo, ids, times = given["prompt"], tuple(given["ids"]), tuple(map(float, given["arrivals_s"]))
        except (TypeError, ValueError, LookupError) as error:
            raise self._wrong(f"prompt, ids and arrivals_s, but: {type(error).__name__}: {error}") from None
        if echo != prompt:
            raise self._wrong(f"for the {len(prompt)} tokens that it was asked, but continued {len(echo)} other ones")
        if not all(isinstance(id, int) and 0 <= id < self.facts.vocabulary for id in ids):
            raise self._wrong(f"tokens from 0 to {self.facts.vocabulary - 1}, but gave {ids[:20]}")
        whole = len(ids) == new_tokens or (0 < len(ids) < new_tokens and ids[-1] in stops)
        if not whole or stops.intersection(ids[:-1]):
            raise self._wrong(
                f"{new_tokens} tokens, or fewer up to the first of the stop tokens {sorted(stops)}, but gave "
                f"{len(ids)}: {ids[:20]}"
            )
        if len(times) != len(ids) or list(times) != sorted(times) or not 0 <= times[0] <= times[-1] < math.inf:
            raise self._wrong(f"a time for each of {len(ids)} tokens, none before the last, but gave {times[:20]}")
        return Continuation(ids=ids, arrivals_s=times)
