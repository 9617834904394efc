"""One run of the benchmarks: opens the base once, compresses each recipe once, measures, records and judges.

The tests in `bench/test_*.py` say what is measured; a `Workbench` does it. Only the base and one compressed model are
in memory at any time. Every row is in the journal before the next measurement starts.
"""

import functools
import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench.gate as gates
from bench import paired
from bench._errors import BenchError, MetricError, NotAvailable, OptionError
from bench.generation import Decoder, Interleaved, Load
from bench.items import Items
from bench.metrics import Metric, metrics_of
from bench.results import Journal, Row, resume
from compression import Recipe, locate
from compression._recipe import UNCOMPRESSED

if TYPE_CHECKING:
    from bench.data import Data
    from bench.gate import Baseline, Verdict
    from bench.rag.collection import Collection
    from bench.rag.pipeline import Retrieved, Setup
    from bench.sandbox import Forbidden
    from compression import Base, Compressed
    from compression._cache import StepCache

Reading = Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for, checked."""

    base: str = "reference"
    recipes: tuple[Recipe, ...] = ()
    data: str | None = None
    calibration: str | None = None
    teacher: str | None = None
    downstream: str | None = None
    derived: tuple[Recipe, ...] = ()  # recipes that are made beside those, for what is measured of them
    cache: Path | None = None
    device: str = "cpu"
    seed: int = 0
    gate: str = "auto"
    baselines: Path = Path("baselines")
    update: bool = False
    journal: Path = Path(".bench/journal.jsonl")
    resume: bool = False
    batch_sizes: tuple[int, ...] = (1,)
    prompt_tokens: int = 128
    new_tokens: int = 128
    runs: int = 10
    warmup: int = 3
    tdp: float | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    rag: "Setup | None" = None
    tasks: tuple[Any, ...] = ()  # bench.tasks.Task
    limit: int | None = None
    task_rows: int | None = None
    chat_template: bool = False
    allow_code_execution: bool = False
    command: str = "pytest bench"

    def load(self, batch_size: int) -> Load:
        return Load(batch_size=batch_size, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens)

    @property
    def record_command(self) -> str:
        return f"{self.command} --update-baselines"


class Failure(Exception):
    """A measurement that could not be made; its rows are recorded already."""


class Workbench:
    """See the module. Made before anything expensive: reads the baselines and claims the journal.

    Raises:
        BenchError: a baseline is damaged, the journal cannot be written, the data is not there.
        CompressionError: a recipe cannot take the base.
    """

    def __init__(self, options: Options, progress: Callable[[int, int, str], None] | None = None):
        from bench import machine
        from compression._checks import check_source

        self.options, self._progress = options, progress
        if options.gate not in gates.MODES:
            raise OptionError(f"--gate {options.gate}: allowed are {', '.join(gates.MODES)}")
        if options.device.startswith("cuda"):
            import torch

            torch.cuda.set_device(
                machine.device_of(options.device)
            )  # events and graphs are those of the current device
        self.fingerprint = machine.fingerprint(options.device)
        self.source = locate(options.base).fetch()
        if self.source.published is None:
            recipes = (*options.recipes, *options.derived)
            check_source(recipes, self.source, options.calibration, options.teacher, options.downstream)
        else:
            from compression._formats._model import check_recipe

            for recipe in options.recipes:
                check_recipe(self.source.published, recipe)
        positions = self.source.config.get("max_position_embeddings")
        if positions and options.prompt_tokens + options.new_tokens > positions:
            raise OptionError(
                f"--prompt-tokens {options.prompt_tokens} and --max-new-tokens {options.new_tokens} exceed the "
                f"{positions} positions of {self.source.label}"
            )
        self.baselines: dict[str, Baseline | None] = {
            recipe.text: gates.Baseline.find(options.baselines, self.source.label, recipe.text)
            for recipe in options.recipes
        }
        resumed = resume(options.journal) if options.resume else None
        if resumed:
            self._check_resumed(resumed.context)
        self._done = resumed.rows if resumed else {}
        self.journal = Journal(options.journal, run=resumed.run if resumed else None)
        self.rows: dict[tuple[str, str], Row] = {}
        self.verdicts: dict[tuple[str, str], Verdict] = {}
        self.changes: list[str] = []
        self.kernels: dict[str, dict[str, int]] = {}
        self.steps: dict[str, tuple[tuple[str, float], ...]] = {}  # what was executed, and its seconds
        self._base: Base | None = None
        self._compressed: tuple[Recipe, Compressed | BaseException] | None = None
        self._folder: Path | None = None
        self._base_readings: dict[Any, Reading] = {}
        self._readings: dict[Any, Reading] = {}
        self._tasks: dict[str, Any] = {}
        self._started = False

    def _check_resumed(self, context: Mapping[str, Any]) -> None:
        """Rows of another checkpoint, code or number of rounds must not stand beside new ones as one run.

        Raises:
            OptionError: one of them differs.
        """
        now = self._identity
        for name in sorted(now.keys() & context.keys()):
            if context[name] != now[name]:
                raise OptionError(
                    f"--resume: the unfinished run in {self.options.journal} had {name} {context[name]!r}, now it is "
                    f"{now[name]!r}; start anew without --resume"
                )

    # --- models -------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> "Base":
        """The uncompressed model, opened at its first use and kept; that of a published checkpoint is dequantized."""
        if self._base is None:
            import compression

            self._base = compression.open_base(
                self.options.base, self.options.device, seed=self.options.seed, dequantize=True
            )
        return self._base

    def compressed(self, recipe: Recipe) -> "Compressed":
        """The base under a recipe, or a published checkpoint as it is; the one before it is let go first.

        Raises:
            Exception: whatever compressing raised, again for each measurement of the recipe.
        """
        if self._compressed is None or self._compressed[0] != recipe:
            import compression

            self._release()
            base = self.base
            try:
                if self.source.published is not None and recipe.steps:
                    assert self.source.folder is not None
                    backend = getattr(recipe.steps[0].method, "backend", None)
                    result = compression.load(self.source.folder, self.options.device, backend=backend)
                else:
                    result = compression.compress(
                        base,
                        recipe,
                        seed=self.options.seed,
                        calibration=self.options.calibration,
                        teacher=self.options.teacher,
                        downstream=self.options.downstream,
                        cache=self._steps,
                        progress=self._progress,
                    )
            except Exception as error:
                self._compressed = (recipe, error)
                raise
            self._compressed = (recipe, result)
            self.kernels[recipe.text] = result.kernels()
            self.steps[recipe.text] = tuple(zip(result.executed, result.seconds, strict=False))
        if isinstance(self._compressed[1], BaseException):
            raise self._compressed[1]
        return self._compressed[1]

    @functools.cached_property
    def _steps(self) -> "StepCache":
        """Keeps what recipes that train come to, and what other recipes begin with as they do."""
        from compression._cache import StepCache, default_folder
        from compression._schedule import make_schedule

        beginnings: list[tuple[str, ...]] = []
        recipes = dict.fromkeys((*self.options.recipes, *self.options.derived))
        for recipe in recipes:
            texts = tuple(what for _, what in make_schedule(recipe.steps))
            if any(step.method.trains for step in recipe.steps):
                beginnings += [texts[: i + 1] for i in range(len(texts))]
        whole = {tuple(what for _, what in make_schedule(recipe.steps)) for recipe in recipes}
        shared = {texts for texts in beginnings if beginnings.count(texts) + (texts in whole) > 1}
        folder = self.options.cache or default_folder()
        return StepCache(folder, keep=lambda texts: tuple(texts) in shared)

    @functools.cached_property
    def downstream(self) -> str:
        """The task that recovery is measured on."""
        from bench.metrics.recovery import check_task

        return check_task(self.options.downstream, self.source)

    def artefact_folder(self, recipe: Recipe) -> Path:
        """Where the compressed model lies on disk, for processes that open it by themselves; gone with the model."""
        model = self.compressed(recipe)  # lets go of the folder of another recipe
        if self._folder is None:
            folder = Path(tempfile.mkdtemp(prefix="bench-"))
            try:
                model.save(folder / "artefact")
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._folder = folder
        return self._folder / "artefact"

    def _release(self) -> None:
        self._compressed = None
        self._readings = {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        gc.collect()
        if self.options.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    @functools.cached_property
    def data(self) -> "Data":
        from bench.data import open_data

        return open_data(self.options.data, base=self.options.base)

    @functools.cached_property
    def sandbox(self) -> "Forbidden":
        """What the programs that models write cannot do here; to be asked for before one is run (`bench.sandbox`).

        Raises:
            NotAvailable: they may not be run, or cannot be run apart.
        """
        if not self.options.allow_code_execution:
            raise NotAvailable("programs written by models are run only with --allow-code-execution")
        from bench.sandbox import forbidden

        return forbidden()

    @functools.cached_property
    def collection(self) -> "Collection":
        """The questions of RAG and the documents they are about; only the reference is asked as it was trained."""
        from bench.rag.readers import open_collection

        assert self.options.rag is not None
        found = open_collection(self.options.rag.dataset, self.options.rag.documents)
        return found if self.options.base in ("reference", "reference-teacher") else replace(found, form="plain")

    @functools.cached_property
    def retrieved(self) -> "Retrieved":
        """What was found for each question, the same for all recipes; indexes are kept beside the journal."""
        from bench.rag.answers import check_lengths
        from bench.rag.pipeline import retrieve

        assert self.options.rag is not None
        tokenizer, device = self.base.tokenizer, self.options.device
        cache = self.options.journal.parent / "retrieval"
        found = retrieve(self.options.rag, tokenizer, device=device, cache=cache, collection=self.collection)
        if tokenizer is not None and found.collection.answered:
            check_lengths(found, tokenizer, self.source.config.get("max_position_embeddings"), self.options.new_tokens)
        return found

    def task(self, task: Any) -> Any:
        """A task with its data (`bench.tasks.prepare.Prepared`), read once.

        Raises:
            NotAvailable: it cannot be had, again at every call.
            DataError: its data is malformed.
        """
        from bench.tasks.prepare import prepare

        if task.name not in self._tasks:
            try:
                if task.runs_code and self.options.allow_code_execution:
                    self.sandbox  # noqa: B018 - what cannot be contained is refused, or said, before
                self._tasks[task.name] = prepare(task, self.data, run_code=self.options.allow_code_execution)
            except NotAvailable as error:
                self._tasks[task.name] = error
        if isinstance(found := self._tasks[task.name], NotAvailable):
            raise found
        return found

    def decoder(self, model: "Compressed | Base", load: Load, mode: str = "eager") -> Decoder:
        cache_factory = getattr(model, "cache_factory", None)
        return Decoder(model.model, load, mode=mode, seed=self.options.seed, cache_factory=cache_factory)

    def refuse_shared_device(self) -> None:
        """Timings of a device that other pytest-xdist workers use at the same time mean nothing.

        Raises:
            OptionError: this is one of several workers.
        """
        if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
            raise OptionError("timings are refused under pytest-xdist with several workers: run without -n")

    # --- measuring ----------------------------------------------------------------------------------------------------

    def measure(
        self,
        of: str,
        recipe: Recipe,
        take: Callable[[], tuple[Reading, Reading | None]],
        params: Mapping[str, Any] | None = None,
        *,
        each: Callable[[Reading], Sequence[Reading]] | None = None,
        again: bool = False,
        notes: Callable[[Reading], tuple[str, str | None, Any]] | None = None,
    ) -> None:
        """Take one measurement and record and judge every metric of it.

        Args:
            of: the kind of measurement; all metrics of that kind are computed.
            take: makes the reading of the compressed model and that of the base (None for the base itself).
            params: part of the key of each row; a reading's own `params` are added.
            each: splits a reading into those of its rounds, for samples.
            again: take once more before a regression is believed (timings, memory).
            notes: (status, reason, source) of a reading; ("ok", None, None) if not given.

        Raises:
            AssertionError: a verdict fails; the words of each are in the message.
        """
        params = {**self._given(recipe), **(params or {})}
        if self._resumed(of, recipe, params):
            return
        with self._failures(of, recipe, params):
            try:
                rows = self._rows(of, recipe, take(), params, each, notes)
            except NotAvailable as error:  # the rows say so, and fail only where a baseline has them
                rows = self._unmeasured(of, recipe, params, "not_available", str(error))
            found = self._judge(rows)
            if again and any(v.outcome == "regressed" for v in found):
                self._base_readings = {key: kept for key, kept in self._base_readings.items() if key[0] != of}
                rows = self._rows(of, recipe, take(), params, each, notes)
                found = self._judge(rows)
        self._record(rows, found)
        self._assert(found)

    def _given(self, recipe: Recipe) -> dict[str, Any]:
        """Text and teacher that are not the base's own belong to the key of what they make."""
        methods = [step.method for step in recipe.steps]
        given = {
            "calibration": self.options.calibration if any(method.calibration for method in methods) else None,
            "teacher": self.options.teacher if any(method.teacher for method in methods) else None,
            "downstream": self.options.downstream if any(method.downstream for method in methods) else None,
        }
        return {name: text for name, text in given.items() if text is not None}

    def base_reading(self, key: Any, take: Callable[[], Reading]) -> Reading:
        """A reading of the uncompressed model that does not have to be taken beside each recipe: taken once."""
        if key not in self._base_readings:
            self._base_readings[key] = take()
        return self._base_readings[key]

    def reading(self, recipe: Recipe, key: Any, take: "Callable[[Compressed], Reading]") -> Reading:
        """A reading of the compressed model that several measurements share: taken once, and gone with the model."""
        model = self.compressed(recipe)
        if key not in self._readings:
            self._readings[key] = take(model)
        return self._readings[key]

    def interleaved(self, recipe: Recipe, load: Load, mode: str) -> Interleaved:
        """The base and the compressed model, ready to generate in turn; for fp16 the base alone."""
        models = [self.base] if recipe.text == UNCOMPRESSED else [self.base, self.compressed(recipe)]
        return Interleaved([self.decoder(model, load, mode) for model in models])

    def _rows(
        self,
        of: str,
        recipe: Recipe,
        readings: tuple[Reading, Reading | None],
        params: Mapping[str, Any],
        each: Callable[[Reading], Sequence[Reading]] | None,
        notes: Callable[[Reading], tuple[str, str | None, Any]] | None,
    ) -> list[Row]:
        reading, base = readings
        status, reason, source = notes(reading) if notes else ("ok", None, None)
        params = {k: v for k, v in {**params, **getattr(reading, "params", {})}.items() if v is not None}
        items, base_items = _items_of(reading), {} if base is None else _items_of(base)
        rows = []
        for metric in metrics_of(of):
            value = metric(reading)
            base_value = None if base is None else metric(base)
            samples = tuple(metric(r) for r in each(reading)) if each and metric.per_device else ()
            base_samples = tuple(metric(r) for r in each(base)) if samples and base is not None and each else ()
            own, others = items.get(metric.name), base_items.get(metric.name)
            if own is not None:
                paired.check(metric, value, own)
            row = self._row(
                of, recipe, metric, params, value=value, base_value=base_value, status=status, reason=reason,
                ratio=value / base_value if base_value else None, source=source,
                samples=samples, base_samples=base_samples, items=own,
                paired=None if own is None or others is None else paired.compare(own, others).to_json(),
            )  # fmt: skip
            rows.append(row)
        return rows

    def _unmeasured(self, of: str, recipe: Recipe, params: Mapping[str, Any], status: str, reason: str) -> list[Row]:
        return [self._row(of, recipe, m, params, value=None, status=status, reason=reason) for m in metrics_of(of)]

    def _row(self, of: str, recipe: Recipe, metric: Metric, params: Mapping[str, Any], **values: Any) -> Row:
        return Row(
            run=self.journal.run, base=self.source.label, recipe=recipe.text, device=self.fingerprint,
            metric=metric.name, unit=metric.unit, better=metric.better, params=dict(params),
            seed=self.options.seed, of=of, **values,
        )  # fmt: skip

    @contextmanager
    def _failures(self, of: str, recipe: Recipe, params: Mapping[str, Any]) -> Iterator[None]:
        """A measurement that fails leaves a row that says why for each of its metrics, and fails its test."""
        try:
            yield
        except Exception as error:
            status = "out_of_memory" if _is_out_of_memory(error) else "failed"
            reason = f"{type(error).__name__}: {error}"[:2000]
            rows = self._unmeasured(of, recipe, params, status, reason)
            self._record(rows, self._judge(rows))
            raise Failure(f"{recipe}: {of} could not be measured ({status}): {reason}") from error

    # --- recording and judging ----------------------------------------------------------------------------------------

    @functools.cached_property
    def context(self) -> dict[str, Any]:
        """What every row of this run was measured under."""
        import torch

        from bench import machine

        return {
            "torch": torch.__version__,
            **machine.describe(self.options.device),
            "fingerprint": self.fingerprint,
            "base_hash": self.source.digest,
            "seed": self.options.seed,
            "commit": _commit(),
            "data_hash": {},
        }

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What all rows of a run share that is in no row's key."""
        import torch

        return {
            "base_hash": self.source.digest,
            "commit": _commit(),
            "torch": torch.__version__,
            "runs": self.options.runs,
            "warmup": self.options.warmup,
        }

    def note_data(self, of: str, digest: str) -> None:
        """The data that a kind of measurement read, for the baseline's context."""
        self.context["data_hash"][of] = digest

    def _resumed(self, of: str, recipe: Recipe, params: Mapping[str, Any]) -> bool:
        """Whether the run that is resumed has all rows of this measurement; they are judged, not measured again."""

        given = {key: value for key, value in params.items() if value is not None}.items()

        def matches(row: Row) -> bool:
            same = (row.of, row.recipe, row.base, row.device, row.seed)
            asked = (of, recipe.text, self.source.label, self.fingerprint, self.options.seed)
            return same == asked and given <= dict(row.params).items()

        rows = [row for row in self._done.values() if matches(row) and row.status in ("ok", "estimated")]
        if {row.metric for row in rows} != {m.name for m in metrics_of(of)}:
            return False
        found = self._judge(rows)
        for row, verdict in zip(rows, found, strict=True):
            self.rows[recipe.text, row.key], self.verdicts[recipe.text, row.key] = row, verdict
        self._assert(found)
        return True

    def _judge(self, rows: Sequence[Row]) -> "list[Verdict]":
        mode = "off" if self.options.update else self.options.gate
        return [
            gates.judge(
                row, self.baselines.get(row.recipe), mode=mode, fingerprint=self.fingerprint, context=self.context,
                command=self.options.record_command,
            )
            for row in rows
        ]  # fmt: skip

    def _record(self, rows: Sequence[Row], found: "Sequence[Verdict]") -> None:
        if not self._started:
            self._started = True
            self.journal.start(
                {**self.context, **self._identity, "command": self.options.command, "base": self.source.label}
            )
        for row, verdict in zip(rows, found, strict=True):
            if (row.recipe, row.key) in self.rows:
                raise MetricError(f"{row.recipe}: {row.key} is measured twice in one run")
            self.rows[row.recipe, row.key], self.verdicts[row.recipe, row.key] = row, verdict
            self.journal.append(row)

    @staticmethod
    def _assert(found: "Sequence[Verdict]") -> None:
        failing = [verdict.words for verdict in found if verdict.fails]
        assert not failing, "\n" + "\n".join(failing)

    def finish(self, passed: bool, interrupted: bool = False) -> list[str]:
        """Look for vanished rows, write verdicts, update baselines if asked to; what fails now, in words.

        With `--update-baselines` nothing is written unless the run has passed.
        """
        failing = []
        if not self.options.update and self.options.gate != "off":
            for baseline in self.baselines.values():
                if baseline is not None:
                    for verdict in gates.missing(
                        self.rows.values(), baseline, self.fingerprint, mode=self.options.gate,
                        command=self.options.record_command,
                    ):  # fmt: skip
                        self.verdicts[verdict.recipe, verdict.key] = verdict
                        failing += [verdict.words] if verdict.fails else []
        for verdict in self.verdicts.values():
            self.journal.append({"kind": "verdict", "recipe": verdict.recipe, "key": verdict.key,
                                 "outcome": verdict.outcome, "words": verdict.words})  # fmt: skip
        if self.options.update and self.rows:
            if passed:
                self.changes = gates.update(self.options.baselines, self.rows.values(), self.context, self.fingerprint)
            else:
                failing.append("baselines were not updated: the run failed, and a failed run is no baseline")
        if self.rows:
            self.journal.end("interrupted" if interrupted else "passed" if passed and not failing else "failed")
        return failing

    def close(self) -> None:
        self._release()
        self._base = None
        self.journal.close()


def _items_of(reading: Reading) -> dict[str, Items]:
    """Per-item results by name of the metric: of a reading that has `items`, as `Items` or as what makes them."""
    given = getattr(reading, "items", {})
    return {name: each if isinstance(each, Items) else Items(*each) for name, each in given.items()}


def _is_out_of_memory(error: BaseException | None) -> bool:
    import torch

    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError | BenchError) and "can't allocate memory" in str(error):
            return True  # the CPU allocator's way, here or in the last words of a child process
        if isinstance(error, BenchError) and "memory ran out" in str(error):
            return True
        error = error.__cause__
    return False


def _commit() -> str | None:
    """The commit of the folder that the command runs in, with + if files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


__all__ = ["Failure", "Options", "Workbench"]
