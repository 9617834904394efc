"""`--plan`: the time of quality and RAG, from counted tokens and from batches of the base that are timed now.

Windows, prompts and choices are those of the run. The base is timed on them in the dtype that each measurement uses.
Two assumptions remain: a compressed model takes as long as the base, and every answer uses all tokens that it may have.
"""

import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.errors import BenchError, DataError
from bench.measure import scoring
from bench.measure.answering import answer
from bench.measure.perplexity import KeptStates, perplexity
from bench.measure.perplexity_windows import PerplexityProtocol, samples_of
from bench.measure.rag import robustness
from bench.measure.rag.prompts import prompts
from bench.session.inputs import Inputs
from bench.session.models import Models
from compression.checkpoints.tokens import encode
from compression.recipes.recipe import UNCOMPRESSED

if TYPE_CHECKING:
    from bench.session.options import Options
    from compression import BaseSource

ROWS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 8  # of a timed batch of answers
WINDOWS = 2  # timed, the first as a warm-up
ENOUGH = 10.0  # seconds; a batch that takes longer is timed once, without a warm-up
GROUPS = {"perplexity": "quality", "task": "quality", "answers": "RAG", "speed": "RAG", "distractors": "RAG",
          "unanswerable": "RAG"}  # fmt: skip


class Selected(NamedTuple):
    """A selected test: the name of its function without `test_`, and its parameters."""

    name: str
    params: Mapping[str, Any]

    @property
    def recipe(self) -> str:
        return self.params["recipe"].text


@dataclass(frozen=True, kw_only=True)
class Work:
    """Windows and tokens of a measurement of one model; or the seconds that one of each takes.

    Attributes:
        windows: of perplexity.
        read: tokens of prompts and choices.
        written: tokens of answers.
        stored_read, stored_written: the same one question at a time by the stored model, for the speed of RAG.
    """

    windows: float = 0.0
    read: float = 0.0
    written: float = 0.0
    stored_read: float = 0.0
    stored_written: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def seconds(self, rates: "Work") -> float:
        return sum(value * getattr(rates, name) for name, value in vars(self).items())


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of the selected measurements.

    Attributes:
        recipes: by recipe and group ("quality", "RAG").
        base: of the base beside the recipes, measured once for all of them.
        basis: what the estimate is based on, in words.
        missing: what it leaves out, in words.
    """

    recipes: Mapping[str, Mapping[str, float]]
    base: float
    basis: str
    missing: tuple[str, ...]


def estimate(options: "Options", source: "BaseSource", selected: Sequence[Selected]) -> Estimate | None:
    """The time of the selected measurements of quality and RAG; None if there are none.

    Raises:
        CompressionError: the base cannot be opened.
    """
    timed = [each for each in selected if each.name in GROUPS]
    if not timed:
        return None
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:  # for indexes of retrieval
        return _Estimator(replace(options, journal=Path(folder) / "journal.jsonl"), source).of(timed, begin)


class _Estimator(Models, Inputs):
    """Opens the base and the inputs of a run, counts, and times."""

    def __init__(self, options: "Options", source: "BaseSource"):
        Models.__init__(self, options, source, None)
        self._prompts: list[tuple[int, ...]] = []
        self._counted: dict[Any, Work | str] = {}

    def of(self, selected: Sequence[Selected], begin: float) -> Estimate:
        works: dict[str, dict[str, Work]] = {each.recipe: {} for each in selected}
        missing: dict[str, None] = {}
        for each in selected:
            work, groups = self._work(each), works[each.recipe]
            if isinstance(work, str):
                missing[work] = None
            else:
                groups[GROUPS[each.name]] = groups.get(GROUPS[each.name], Work()) + _in_turn(work, each.recipe)
        whole = {recipe: sum(groups.values(), Work()) for recipe, groups in works.items()}
        rates = self._rates(sum(whole.values(), Work()))
        apart = (replace(work, stored_read=0.0, stored_written=0.0).seconds(rates) for work in whole.values())
        dtype = self.compute_dtype or str(self.base.model.dtype).removeprefix("torch.")
        basis = (
            f"quality and RAG: windows and tokens are counted; batches of {self.source.label} were timed in {dtype}, "
            f"in {time.perf_counter() - begin:.0f} s. A recipe counts as the base, an answer with all its tokens"
        )
        recipes = {
            recipe: {group: work.seconds(rates) for group, work in groups.items()} for recipe, groups in works.items()
        }
        base = 0.0 if UNCOMPRESSED in works else max(apart)
        return Estimate(recipes=recipes, base=base, basis=basis, missing=tuple(missing))

    # --- counting -----------------------------------------------------------------------------------------------------

    def _work(self, each: Selected) -> Work | str:
        """The work of a test on one model, or why it is unknown."""
        params = {name: value for name, value in each.params.items() if name != "recipe"}
        key = (each.name, *(f"{name}={getattr(value, 'name', value)}" for name, value in sorted(params.items())))
        if key not in self._counted:
            try:
                if self.base.tokenizer is None:
                    raise DataError(f"base {self.source.text} has no tokenizer")
                self._counted[key] = getattr(self, f"_{each.name}")(**params)
            except BenchError as error:
                self._counted[key] = f"{each.name.replace('_', ' ')}: not counted: {error}"
        return self._counted[key]

    def _perplexity(self) -> Work:
        protocol, options = PerplexityProtocol(**self.options.protocol), self.options
        context = self.base.model.config.max_position_embeddings
        found = samples_of(self.base.tokenizer, self.data, protocol, context=context, template=options.template)
        return Work(windows=len(found))

    def _task(self, task: Any) -> Work:
        scorer = scoring.lm_eval.Scorer(self.compute_model(self.base), self.base.tokenizer,
                                        template=self.options.template)  # fmt: skip
        with redirect_stderr(io.StringIO()):  # progress bars of the libraries that read and build tasks
            prepared = self.task(task)
            found = scoring.count.task_tokens(
                prepared, scorer, limit=self.options.limit, chat=self.options.chat_template
            )
        self._prompts += found.prompts
        return Work(read=found.read, written=found.written)

    def _answers(self, decoding: str) -> Work:
        rag, bare, count = self._questions()
        times = 1 if decoding == "greedy" else self.options.rag.seeds  # type: ignore[union-attr]
        return Work(read=times * count * (rag + bare), written=times * count * self._tokens_of_answers)

    def _speed(self) -> Work:
        rag, bare, count = self._questions()
        count = 1 + min(count, self.options.runs)  # one warms up
        return Work(stored_read=count * (rag + bare), stored_written=count * self._tokens_of_answers)

    def _distractors(self, distractors: int, gold: str) -> Work:
        rag, _, count = self._questions()
        count = min(count, robustness.QUESTIONS)
        return Work(read=count * rag * (1 + distractors) / self.options.rag.top_k,  # type: ignore[union-attr]
                    written=count * robustness.NEW_TOKENS)  # fmt: skip

    def _unanswerable(self) -> Work:
        rag, _, count = self._questions()
        count = 2 * min(count, robustness.QUESTIONS)
        return Work(read=count * rag, written=count * robustness.NEW_TOKENS)

    def _questions(self) -> tuple[float, float, int]:
        """Mean tokens of a prompt with and without its context (0 if that is not asked), and the questions."""
        found, tokenizer = self.retrieved, self.base.tokenizer
        means = []
        for rag in (True, False):
            texts = prompts(found, found.answerable, tokenizer, self.options.template, rag=rag)  # type: ignore[arg-type]
            ids = [tuple(encode(tokenizer, text)) for text in texts]
            self._prompts += ids[:ROWS] if rag else []
            means.append(sum(map(len, ids)) / max(1, len(ids)) if rag or found.setup.compare else 0.0)
        return means[0], means[1], len(found.answerable)

    @property
    def _tokens_of_answers(self) -> int:
        """Of a question, with and without its context."""
        return self.options.new_tokens * (2 if self.options.rag.compare else 1)  # type: ignore[union-attr]

    # --- timing -------------------------------------------------------------------------------------------------------

    def _rates(self, work: Work) -> Work:
        """Seconds for one of each kind that there is work of."""
        rates = Work()
        if work.windows:
            rates += Work(windows=self._window_seconds())
        if work.read or work.written:
            read, written = self._answer_seconds(self.compute_model(self.base), ROWS)
            rates += Work(read=read, written=written)
        self.release_compute_models()
        if work.stored_read:
            read, written = self._answer_seconds(self.base.model, 1)
            rates += Work(stored_read=read, stored_written=written)
        return rates

    def _window_seconds(self) -> float:
        """Of one window read by a model next to the base, whose hidden states are kept."""
        model, times = self.compute_model(self.base), [time.perf_counter()]
        protocol = replace(PerplexityProtocol(**self.options.protocol), samples=WINDOWS, batch_size=1)

        def note(done: int, count: int) -> None:
            times.append(time.perf_counter())
            if times[1] - times[0] > ENOUGH:
                raise _EnoughError

        with suppress(_EnoughError):
            perplexity(model, self.base.tokenizer, self.data, protocol, device=self.options.device, base=model,
                       states=KeptStates(model), progress=note, template=self.options.template)  # fmt: skip
        first = int(len(times) > 2)  # the end of the warm-up, if another window was timed
        return (times[-1] - times[first]) / (len(times) - 1 - first)

    def _answer_seconds(self, model: Any, rows: int) -> tuple[float, float]:
        """Of a token read and of a token written, in a batch of so many prompts that are cut to equal lengths."""
        ids = [each[-PROMPT_TOKENS:] for each in dict.fromkeys(self._prompts)][:rows]

        def seconds(new_tokens: int) -> float:
            begin = time.perf_counter()
            answer(model, self.base.tokenizer, ids, new_tokens=new_tokens)
            return time.perf_counter() - begin

        read = seconds(1)
        read = read if read > ENOUGH else seconds(1)
        written = seconds(1 + NEW_TOKENS) - read
        return read / sum(map(len, ids)), max(0.0, written) / NEW_TOKENS / len(ids)


class _EnoughError(Exception):
    """A batch took so long that one is enough."""


def _in_turn(work: Work, recipe: str) -> Work:
    """The work, and that of the base where the run times both in turn."""
    turns = 1 if recipe == UNCOMPRESSED else 2
    return replace(work, stored_read=turns * work.stored_read, stored_written=turns * work.stored_written)
