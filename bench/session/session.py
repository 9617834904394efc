"""One run of the benchmarks: opens the base once, compresses each recipe once, measures, records and judges.

The tests in `bench/test_*.py` say what is measured; a `Workbench` does it. Only the base and one compressed model are
in memory at any time. Every row is in the journal before the next measurement starts.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import bench.gate.verdicts as gates
from bench.errors import BenchError, JournalError, NotAvailable, OptionError
from bench.machine import device
from bench.machine import git as repository
from bench.measure.against.commit import Beside, Commit, Job
from bench.measure.generation import Load
from bench.measure.perplexity import KeptStates
from bench.metrics import metrics_of, size
from bench.metrics.registry import check_items
from bench.results import item_pairs
from bench.results.items import Items
from bench.results.row import Row
from bench.session.inputs import Inputs
from bench.session.models import Models
from bench.session.options import Options
from bench.session.recorder import Findings
from bench.session.served import Served
from compression import UNCOMPRESSED, Recipe, locate
from compression.checkpoints.tokens import check_template
from compression.files.terminal import terminal

if TYPE_CHECKING:
    from bench.gate.verdicts import Verdict
    from compression import Compressed

Reading = Any


class Failure(Exception):
    """A measurement that could not be made; its rows are recorded already."""


class Workbench(Models, Inputs, Findings):
    """See the module. Made before anything expensive: reads the baselines and claims the journal.

    Attributes:
        failing: what fails of sizes that no test is for, in words.

    Raises:
        BenchError: a baseline is damaged, the journal cannot be written, the data is not there.
        CompressionError: a recipe cannot take the base.
    """

    def __init__(self, options: Options, progress: Callable[[int, int, str], None] | None = None):
        if options.gate not in gates.MODES:
            raise OptionError(f"--gate must be one of {', '.join(gates.MODES)}, not {options.gate}")
        if options.update and not options.force_update and (files := repository.changed(options.baselines)):
            raise OptionError(
                f"--update-baselines: {len(files)} tracked files differ from the commit that the baseline would name "
                f"({', '.join(files[:5])}); commit or stash them, or record anyway with --force-update"
            )
        self.fingerprint = device.fingerprint(options.device)
        Models.__init__(self, options, locate(options.base).fetch(), progress)
        self.make_plans()
        for recipe in (*options.recipes, *options.derived):
            if recipe.text not in self.refused or recipe.on_load:
                self.inputs_of(recipe)  # texts that cannot be read are refused now, by what the digest is of
        if options.template:
            check_template(self.source.tokenizer, options.template)
        positions = self.source.config.get("max_position_embeddings")
        if positions and options.prompt_tokens + options.new_tokens > positions:
            raise OptionError(
                f"--prompt-tokens {options.prompt_tokens} and --max-new-tokens {options.new_tokens} exceed the "
                f"{positions} positions of {self.source.label}"
            )
        self.against = Commit(options.against) if options.against else None
        Findings.__init__(self)
        self.lost_device = False
        self.failing: list[str] = []
        self._base_readings: dict[Any, Reading] = {}
        self._readings: dict[Any, Reading] = {}

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
        compute_models: bool = False,
    ) -> None:
        """Take one measurement and record and judge every metric of it.

        Args:
            of: the kind of measurement; all metrics of that kind are computed.
            take: makes the reading of the compressed model and that of the base (None for the base itself).
            params: part of the key of each row; a reading's own `params` are added.
            each: splits a reading into those of its rounds, for samples.
            more: takes the measurement with so many times the usual rounds (timings, memory). It is asked, up to
                `gate.MORE` times them, until the gate has decided.
            notes: (status, reason, source) of a reading; ("ok", its remark if it has one, None) if not given.
            compute_models: whether `take` uses `compute_model`; rows then name its dtype. If not, the copies that it
                made are let go first.

        Raises:
            AssertionError: a verdict fails; the words of each are in the message.
        """
        __tracebackhide__ = methodcaller("errisinstance", AssertionError)  # a verdict's message says it all
        params = {**self.chosen(recipe), **(params or {})}
        if not compute_models:
            self.release_compute_models()
        self._begin(of, recipe, params)
        if self._resumed(of, recipe, params):
            return
        with self._failures(of, recipe, params):
            if why := self._ended[recipe.text]:
                raise BenchError(why)
            try:
                if self.options.shared and all(metric.kind == "timing" for metric in metrics_of(of)):
                    raise NotAvailable(self.options.shared)
                rows = self._rows(of, recipe, take(), params, each, notes, compute_models)
            except NotAvailable as error:  # the rows say so, and fail only where a baseline has them
                rows = self._unmeasured(of, recipe, params, "not_available", str(error))
            found = self._judge(rows)
            before: Sequence[Verdict] = ()
            for times in gates.MORE if more else ():
                if gates.enough_rounds(found, before):
                    break
                self._base_readings = {key: kept for key, kept in self._base_readings.items() if key[0] != of}
                before, rows = found, self._rows(of, recipe, more(times), params, each, notes)
                found = self._judge(rows)
        self._record(rows, found)
        self._assert(found)

    def measure_size(self, recipe: Recipe) -> None:
        """What the compressed model stores, and its base; raises as `measure` does."""

        __tracebackhide__ = methodcaller("errisinstance", AssertionError)

        def take() -> tuple[Reading, Reading | None]:
            base, compressed = self.base.model, self.compressed(recipe)
            own = size.reading(compressed.model, base, compressed.bytes_in_files)
            return own, size.reading(base, base) if recipe.steps else None

        self.measure("artefact", recipe, take)

    def beside(self, recipe: Recipe, load: Load, mode: str) -> Beside:
        """Both sides of `--against`. What a recipe trained is this code's on both: the commit's would take as long."""
        assert self.against is not None
        own = theirs = None
        if recipe.text != UNCOMPRESSED:
            own = self.artefact_folder(recipe)
            trains = any(step.method.trains for step in recipe.steps)
            theirs = own if trains or self.source.published is not None else own.with_name(self.against.name)
        options = self.options
        job = Job(
            base=options.base, recipe=None if own is None else recipe.text, folders=(own, theirs), mode=mode, load=load,
            device=options.device, seed=options.seed, calibration=options.calibration, warmup=options.warmup,
        )  # fmt: skip
        return Beside(job, self.against)

    @functools.cached_property
    def _base_states(self) -> KeptStates:
        return KeptStates()

    @property
    def base_states(self) -> KeptStates:
        """Hidden states of the base on held-out text, computed once for all recipes."""
        self._base_states.model = self.compute_model(self.base)
        return self._base_states

    def release_compute_models(self) -> None:
        super().release_compute_models()
        if "_base_states" in vars(self):
            self._base_states.model = None

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
        compute_models: bool = False,
    ) -> list[Row]:
        reading, base = readings
        status, reason, source = notes(reading) if notes else ("ok", getattr(reading, "remark", None), None)
        dtype = self.compute_dtype if compute_models else getattr(reading, "compute_dtype", None)
        if compute_models:
            reason = "; ".join(filter(None, (reason, self.compute_fallback))) or None
        own = {**getattr(reading, "params", {}), **getattr(reading, "inputs", {})}
        params = {name: each for name, each in {**params, **own}.items() if each is not None}
        items, base_items = _items_of(reading), {} if base is None else _items_of(base)
        rows = []
        for metric in metrics_of(of):
            if self.options.shared and metric.kind == "timing":
                refused = {"status": "not_available", "reason": self.options.shared}
                rows.append(self._row(of, recipe, metric, params, value=None, **refused))
                continue
            try:
                value = metric(reading)
            except NotAvailable as error:  # one metric of several cannot be had of it
                unavailable = {"status": "not_available", "reason": str(error)}
                rows.append(self._row(of, recipe, metric, params, value=None, **unavailable))
                continue
            base_value = None if base is None else metric(base)
            samples = tuple(metric(r) for r in each(reading)) if each and metric.per_device else ()
            base_samples = tuple(metric(r) for r in each(base)) if samples and base is not None and each else ()
            own, others = items.get(metric.name), base_items.get(metric.name)
            if own is not None:
                check_items(metric, value, own)
            row = self._row(
                of, recipe, metric, params, value=value, base_value=base_value, status=status, reason=reason,
                ratio=value / base_value if base_value else None, source=source,
                samples=samples, base_samples=base_samples, items=own, compute_dtype=dtype,
                paired=None if own is None or others is None else item_pairs.compare(own, others).to_json(),
            )  # fmt: skip
            rows.append(row)
        return rows

    def _unmeasured(self, of: str, recipe: Recipe, params: Mapping[str, Any], status: str, reason: str) -> list[Row]:
        return [self._row(of, recipe, m, params, value=None, status=status, reason=reason) for m in metrics_of(of)]

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
            words = terminal(f"{recipe}: {of} could not be measured ({status}): {reason}")
            raise Failure(words) from error

    @functools.cached_property
    def served(self) -> Served:
        """The models of the run as engines serve them."""
        return Served(self)

    def release(self) -> None:
        """Let go of the compressed model. Its size is recorded before, where no test of this run did that."""
        recipe, model = self._compressed or (None, None)
        if "served" in vars(self):
            self.served.release()
        if recipe in self.options.recipes and not isinstance(model, BaseException) and not self.lost_device:
            self._record_size(recipe)
        super().release()
        self._readings = {}

    def _record_size(self, recipe: Recipe) -> None:
        if not any(row.of == "artefact" for row in self.rows.values() if row.recipe == recipe.text):
            try:
                self.measure_size(recipe)
            except (AssertionError, Failure, JournalError) as error:  # the measurement that comes next is not to blame
                self.failing.append(str(error))

    def _judge_resumed_sizes(self) -> None:
        """Of recipes that were not compressed again, since the run that is gone on with has all else of them."""
        for recipe in self.options.recipes if self._done else ():
            if not any(row.of == "artefact" for row in self.rows.values() if row.recipe == recipe.text):
                try:
                    self._resumed("artefact", recipe, self.chosen(recipe))
                except AssertionError as error:
                    self.failing.append(str(error))

    def finish(self, passed: bool, interrupted: bool = False) -> list[str]:
        """As `Findings.finish`; what fails of sizes that no test is for is among the words."""
        if not self.lost_device:  # whose driver could end the run before its verdicts are written
            self.release()
        self._judge_resumed_sizes()
        return [*self.failing, *super().finish(passed and not self.failing, interrupted)]

    def close(self) -> None:
        self.release()
        if self.against is not None:
            self.against.close()
        self._base = None
        if "served" in vars(self):
            self.served.close()
        for name in ("_base_states", "_compute", "served"):
            vars(self).pop(name, None)
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
