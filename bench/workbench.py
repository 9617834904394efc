"""One run of the benchmarks: opens the base once, compresses each recipe once, measures, records and judges.

The tests in `bench/test_*.py` say what is measured; a `Workbench` does it. Only the base and one compressed model are
in memory at any time. Every row is in the journal before the next measurement starts.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench.gate as gates
from bench import _repository as repository
from bench import paired
from bench._errors import BenchError, JournalError, MetricError, NotAvailable, OptionError
from bench._inputs import Inputs
from bench._models import Models
from bench.generation import Load
from bench.items import Items
from bench.journal import Journal, matches, read, resume
from bench.metrics import Metric, metrics_of
from bench.rows import MEASURED, REFUSED, Row
from compression import Recipe, locate

if TYPE_CHECKING:
    from bench.gate import Baseline, Verdict
    from bench.judge.setup import Setup as Judging
    from bench.rag.pipeline import Setup
    from compression import Compressed

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
    force_update: bool = False  # also of a failed run, or from a tree with changed files
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
    judge: "Judging | None" = None
    tasks: tuple[Any, ...] = ()  # bench.tasks.Task
    limit: int | None = None
    task_rows: int | None = None
    chat_template: bool = False
    allow_code_execution: bool = False
    command: str = "pytest bench"
    run: str | None = None  # id of the run that this process is part of, where it did not begin it
    began: float = 0.0  # and when that began, in seconds since the epoch
    shared: str | None = None  # why no times can be taken on this device, in words

    def load(self, batch_size: int) -> Load:
        return Load(batch_size=batch_size, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens)

    @property
    def record_command(self) -> str:
        return f"{self.command} --update-baselines"


class Failure(Exception):
    """A measurement that could not be made; its rows are recorded already."""


class Workbench(Models, Inputs):
    """See the module. Made before anything expensive: reads the baselines and claims the journal.

    Raises:
        BenchError: a baseline is damaged, the journal cannot be written, the data is not there.
        CompressionError: a recipe cannot take the base.
    """

    def __init__(self, options: Options, progress: Callable[[int, int, str], None] | None = None):
        from bench import machine
        from compression._checks import check_source

        if options.gate not in gates.MODES:
            raise OptionError(f"--gate {options.gate}: allowed are {', '.join(gates.MODES)}")
        if options.device.startswith("cuda"):
            import torch

            torch.cuda.set_device(
                machine.device_of(options.device)
            )  # events and graphs are those of the current device
        if options.update and not options.force_update and (files := repository.changed(options.baselines)):
            raise OptionError(
                f"--update-baselines: {len(files)} tracked files differ from the commit that the baseline would name "
                f"({', '.join(files[:5])}); commit or stash them, or record all the same with --force-update"
            )
        self.fingerprint = machine.fingerprint(options.device)
        super().__init__(options, locate(options.base).fetch(), progress)
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
        resumed = resume(options.journal, options.run) if options.resume else None
        if resumed:
            self._check_resumed(resumed.context)
        self._done = resumed.rows if resumed else {}
        self.journal = Journal(options.journal, run=resumed.run if resumed else options.run)
        self._unwritten: list[Row | Mapping[str, Any]] = []
        self._ended: dict[str, str | None] = {}  # by recipe: why it is not tried again
        self.lost_device = False
        self.rows: dict[tuple[str, str], Row] = {}
        self.verdicts: dict[tuple[str, str], Verdict] = {}
        self.changes: list[str] = []
        self._base_readings: dict[Any, Reading] = {}
        self._readings: dict[Any, Reading] = {}
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

    # --- measuring ----------------------------------------------------------------------------------------------------

    def measure(
        self,
        of: str,
        recipe: Recipe,
        take: Callable[[], tuple[Reading, Reading | None]],
        params: Mapping[str, Any] | None = None,
        *,
        each: Callable[[Reading], Sequence[Reading]] | None = None,
        more: Callable[[int], tuple[Reading, Reading | None]] | None = None,
        notes: Callable[[Reading], tuple[str, str | None, Any]] | None = None,
    ) -> None:
        """Take one measurement and record and judge every metric of it.

        Args:
            of: the kind of measurement; all metrics of that kind are computed.
            take: makes the reading of the compressed model and that of the base (None for the base itself).
            params: part of the key of each row; a reading's own `params` are added.
            each: splits a reading into those of its rounds, for samples.
            more: takes the measurement with so many times the usual rounds (timings, memory). It is asked, up to
                `gate.MORE` times them, until the gate has decided.
            notes: (status, reason, source) of a reading; ("ok", None, None) if not given.

        Raises:
            AssertionError: a verdict fails; the words of each are in the message.
        """
        params = {**self._given(recipe), **(params or {})}
        self._begin(of, recipe, params)
        if self._resumed(of, recipe, params):
            return
        with self._failures(of, recipe, params):
            if why := self._ended[recipe.text]:
                raise BenchError(why)
            try:
                if self.options.shared and all(metric.kind == "timing" for metric in metrics_of(of)):
                    raise NotAvailable(self.options.shared)
                rows = self._rows(of, recipe, take(), params, each, notes)
            except NotAvailable as error:  # the rows say so, and fail only where a baseline has them
                rows = self._unmeasured(of, recipe, params, "not_available", str(error))
            found = self._judge(rows)
            before: Sequence[Verdict] = ()
            for times in gates.MORE if more else ():
                if gates.decided(found, before):
                    break
                self._base_readings = {key: kept for key, kept in self._base_readings.items() if key[0] != of}
                before, rows = found, self._rows(of, recipe, more(times), params, each, notes)
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
            if self.options.shared and metric.kind == "timing":
                refused = {"status": "not_available", "reason": self.options.shared}
                rows.append(self._row(of, recipe, metric, params, value=None, **refused))
                continue
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
            self.lost_device = self.lost_device or _is_lost_device(error)
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
            "commit": repository.commit(self.options.baselines),
            "data_hash": {},
        }

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What all rows of a run share that is in no row's key."""
        import torch

        return {
            "base_hash": self.source.digest,
            "commit": repository.commit(self.options.baselines),
            "torch": torch.__version__,
            "runs": self.options.runs,
            "warmup": self.options.warmup,
        }

    def note_data(self, of: str, digest: str) -> None:
        """The data that a kind of measurement read, for the baseline's context."""
        self.context["data_hash"][of] = digest

    def _resumed(self, of: str, recipe: Recipe, params: Mapping[str, Any]) -> bool:
        """Whether the run that is resumed has all rows of this measurement; they are judged, not measured again."""
        asked = {"of": of, "recipe": recipe.text, "params": params}
        here = (self.source.label, self.fingerprint, self.options.seed)
        rows = [row for row in self._done.values() if row.status in MEASURED and matches(row, asked)]
        rows = [row for row in rows if (row.base, row.device, row.seed) == here]
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
                row, None if _is_refused(row) else self.baselines.get(row.recipe), mode=mode,
                fingerprint=self.fingerprint, context=self.context, command=self.options.record_command,
                shares=self._shares,
            )
            for row in rows
        ]  # fmt: skip

    @functools.cached_property
    def _shares(self) -> "gates.Levels":
        return gates.levels(self.baselines.values(), self.fingerprint, self.context)

    def _record(self, rows: Sequence[Row], found: "Sequence[Verdict]") -> None:
        for recipe in dict.fromkeys(row.recipe for row in rows):
            if (known := self.layers.pop(recipe, None)) is not None:
                self._unwritten.append({"kind": "layers", "base": self.source.label, "recipe": recipe,
                                        "device": self.fingerprint, **known})  # fmt: skip
        for row, verdict in zip(rows, found, strict=True):
            if (row.recipe, row.key) in self.rows:
                raise MetricError(f"{row.recipe}: {row.key} is measured twice in one run")
            self.rows[row.recipe, row.key], self.verdicts[row.recipe, row.key] = row, verdict
        self._write(*rows)

    def _begin(self, of: str, recipe: Recipe, params: Mapping[str, Any]) -> None:
        """Before a measurement: what it is of, so that a process that is killed within it leaves word of that."""
        if recipe.text not in self._ended:
            self._ended[recipe.text] = self._why_ended(recipe)
        records: list[Mapping[str, Any]] = []
        if not self._started:
            self._started = True
            context = {**self.context, **self._identity, "command": self.options.command, "base": self.source.label}
            records.append({"kind": "run", "context": {**context, "data_hash": dict(context["data_hash"])}})
        data = self.context["data_hash"].get(of)
        records.append({"kind": "begin", "of": of, "recipe": recipe.text, "params": dict(params), "data": data})
        with suppress(JournalError):  # said by the rows, which are worth more
            self._write(*records)

    def _why_ended(self, recipe: Recipe) -> str | None:
        """A recipe belongs to one worker; another of the same run that has begun it came to its end in it."""
        if not self.options.began:
            return None
        for each in read(self.options.journal).records:
            mine = each["run"] == self.journal.run and each["time"] >= self.options.began
            if mine and each["kind"] == "begin" and each["recipe"] == recipe.text:
                return (
                    f"a worker was killed, or lost its device, in {recipe}, which is not tried again in this run; "
                    "--resume does"
                )
        return None

    def _write(self, *records: Row | Mapping[str, Any]) -> None:
        """To the journal. What it has no room for (a full disk) is kept, and written once there is some.

        Raises:
            JournalError: there is none now.
        """
        self._unwritten += records
        self.write_waiting()

    def write_waiting(self) -> None:
        """Write what the journal had no room for. Raises JournalError where there still is none."""
        while self._unwritten:
            self.journal.append(self._unwritten[0])
            del self._unwritten[0]

    def gather(self, since: float, killed: str) -> None:
        """Take over and judge what other processes measured for this run since that time.

        A measurement that was begun and lacks rows gets rows that failed; `killed` is their reason.
        """
        contents = read(self.options.journal)
        rows = contents.rows(self.journal.run, since=since)
        begun = [each for each in contents.records if each["kind"] == "begin" and each["run"] == self.journal.run]
        begun = [each for each in begun if each["time"] >= since]
        for each in begun:
            if each["data"] is not None:
                self.note_data(each["of"], each["data"])
        for each in begun:
            self._started = True  # by those who began
            found = [row for row in rows if matches(row, each) and (row.recipe, row.key) not in self.rows]
            recipe, there = Recipe.parse(each["recipe"]), {row.metric for row in rows if matches(row, each)}
            lacking = [metric for metric in metrics_of(each["of"]) if metric.name not in there]
            lost = [self._row(each["of"], recipe, metric, each["params"], value=None, status="failed", reason=killed)
                    for metric in lacking]  # fmt: skip
            for row, verdict in zip(found, self._judge(found), strict=True):
                self.rows[row.recipe, row.key], self.verdicts[row.recipe, row.key] = row, verdict
            self._record(lost, self._judge(lost))

    @staticmethod
    def _assert(found: "Sequence[Verdict]") -> None:
        failing = [verdict.words for verdict in found if verdict.fails]
        assert not failing, "\n" + "\n".join(failing)

    def finish(self, passed: bool, interrupted: bool = False) -> list[str]:
        """Look for vanished rows, write verdicts, update baselines if asked to; what fails now, in words.

        With `--update-baselines` nothing is written unless the run has passed, or is forced and was not interrupted.
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
            self._write({"kind": "verdict", "recipe": verdict.recipe, "key": verdict.key,
                         "outcome": verdict.outcome, "words": verdict.words})  # fmt: skip
        if self.options.update and self.rows:
            forced = self.options.force_update and not interrupted
            if passed or forced:
                self.changes = gates.update(
                    self.options.baselines, self._recordable(), self.context, self.fingerprint, force=forced
                )
            else:
                failing.append(
                    "baselines were not updated: the run failed, and a failed run is no baseline; --force-update "
                    "records what it measured all the same"
                )
        if self.rows:
            self.journal.end("interrupted" if interrupted else "passed" if passed and not failing else "failed")
        return failing

    def _recordable(self) -> list[Row]:
        """The rows of measurements of which nothing was refused: of half a one, the other half would look gone."""

        def measurement(row: Row) -> tuple[str, str, str]:
            return row.of, row.recipe, row.key.removeprefix(row.metric)

        half = {measurement(row) for row in self.rows.values() if _is_refused(row)}
        return [row for row in self.rows.values() if measurement(row) not in half]

    def release(self) -> None:
        super().release()
        self._readings = {}

    def close(self) -> None:
        self.release()
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


def _is_lost_device(error: BaseException | None) -> bool:
    """Whether the driver has given up on this process: no CUDA call of it will work again."""
    import torch

    while error is not None:
        if isinstance(error, torch.AcceleratorError) or (
            isinstance(error, RuntimeError) and "CUDA error" in str(error)
        ):
            return not _is_out_of_memory(error)
        error = error.__cause__
    return False


def _is_refused(row: Row) -> bool:
    """A time that was not taken because workers share the device: no fault, whatever a baseline has."""
    return row.status == "not_available" and str(row.reason).startswith(REFUSED)


__all__ = ["Failure", "Options", "Workbench"]
