"""Records the rows of a run: writes them to the journal, judges them, stores new baselines."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import bench.gate.verdicts as gates
from bench.errors import JournalError, MetricError, OptionError
from bench.gate import tolerances
from bench.machine import device
from bench.machine import git as repository
from bench.metrics import Metric, all_metrics, metrics_of
from bench.results.bases import OLD
from bench.results.journal import Journal, read, resume
from bench.results.records import matches
from bench.results.row import MEASURED, NATIVE, REFUSED, SCHEMA, Input, Row, keys_of
from compression import Recipe
from compression.files.terminal import terminal

if TYPE_CHECKING:
    from bench.gate.verdicts import Baseline, Proposal, Verdict
    from bench.session.options import Options
    from compression.checkpoints.base import BaseSource


DERIVED = ("tasks",)  # measurements that follow from rows of the same run


class Findings:
    """Reads the baselines and claims the journal; a run that is resumed has the rows that it had.

    Attributes:
        rows, verdicts: of this run, by recipe and key.
        baselines: of each recipe; None where nothing was recorded.
        proposals: what became of the baselines, once they were updated.

    Raises:
        BenchError: a baseline is damaged, the journal cannot be written, the run cannot be resumed.
    """

    options: "Options"
    source: "BaseSource"
    fingerprint: str
    layers: dict[str, dict[str, Any]]  # by recipe, until they are in the journal
    inputs_of: "Callable[[Recipe], dict[str, Input]]"  # see `bench.session.inputs`

    def __init__(self) -> None:
        options = self.options
        self._metrics = tolerances.held(all_metrics(), options.baselines, self.fingerprint)
        self.baselines: dict[str, Baseline | None] = {
            recipe.text: gates.Baseline.find(options.baselines, self.source.label, recipe.text, self.source.digest)
            for recipe in options.recipes
        }
        old = [each for each in self.baselines.values() if each and str(each.base_hash).startswith(OLD)]
        if options.update and old:
            raise OptionError(f"--update-baselines: {old[0].recipe} on {old[0].base}: {gates.MIGRATE}")
        resumed = resume(options.journal, options.run) if options.resume else None
        if resumed:
            self._check_resumed(resumed.context)
        self._done = resumed.rows if resumed else {}
        self.journal = Journal(options.journal, run=resumed.run if resumed else options.run)
        self._unwritten: list[Row | Mapping[str, Any]] = []
        self._ended: dict[str, str | None] = {}  # by recipe: why it is not tried again
        self.rows: dict[tuple[str, str], Row] = {}
        self.verdicts: dict[tuple[str, str], Verdict] = {}
        self.proposals: list[Proposal] = []
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
                    f"--resume: the unfinished run in {self.options.journal} had {name} {context[name]!r}, this one "
                    "has "
                    f"{now[name]!r}; start a new run without --resume"
                )

    @functools.cached_property
    def context(self) -> dict[str, Any]:
        """What every row of this run was measured under."""
        import torch

        return {
            "torch": torch.__version__,
            **device.describe(self.options.device),
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
            "compute_dtype": self.options.compute_dtype,
        }

    def note_data(self, of: str, digest: str) -> None:
        """The data that a kind of measurement read, for the baseline's context."""
        self.context["data_hash"][of] = digest

    def _row(self, of: str, recipe: Recipe, metric: Metric, params: Mapping[str, Any], **values: Any) -> Row:
        return Row(
            run=self.journal.run, base=self.source.label, base_hash=self.source.digest, recipe=recipe.text,
            device=self.fingerprint, metric=metric.name, unit=metric.unit, better=metric.better, params=keys_of(params),
            inputs=self.inputs_of(recipe) | {name: each for name, each in params.items() if isinstance(each, Input)},
            seed=self.options.seed, of=of, **values,
        )  # fmt: skip

    def _resumed(self, of: str, recipe: Recipe, params: Mapping[str, Any]) -> bool:
        """Whether the run that is resumed has all rows of this measurement; they are judged, not measured again.

        Rows that were made with other texts or another teacher do not count, nor do those that follow from other rows.
        """
        __tracebackhide__ = methodcaller("errisinstance", AssertionError)
        if of in DERIVED:
            return False
        asked = {"of": of, "recipe": recipe.text, "params": keys_of(params)}
        here = (self.source.label, self.source.digest, self.fingerprint, self.options.seed)
        again = self.options.shared  # times that were refused would be, for the same reason
        rows = [row for row in self._done.values()
                if (_ended(row) or (again and row.reason == again)) and matches(row, asked)]  # fmt: skip
        if not any(row.status in MEASURED for row in rows):
            return False
        rows = [row for row in rows if (row.base, row.base_hash, row.device, row.seed) == here]
        read = {name: each.digest for name, each in self.inputs_of(recipe).items()}
        rows = [row for row in rows if read.items() <= {name: each.digest for name, each in row.inputs.items()}.items()]
        if {row.metric for row in rows} != {m.name for m in metrics_of(of)}:
            return False
        self._write(*filter(_is_refused, rows))  # refused now as well, for who gathers what was measured since a time
        found = self._judge(rows)
        for row, verdict in zip(rows, found, strict=True):
            self.rows[recipe.text, row.key], self.verdicts[recipe.text, row.key] = row, verdict
        self._assert(found)
        return True

    def _judge(self, rows: Sequence[Row]) -> "list[Verdict]":
        mode = "off" if self.options.update else self.options.gate
        common = {"fingerprint": self.fingerprint, "context": self.context, "metrics": self._metrics}
        return [
            gates.judge_beside(row, level=self._beside_level, mode=mode, **common)
            if row.of == gates.AGAINST
            else gates.judge(
                row, None if _is_refused(row) else self.baselines.get(row.recipe), mode=mode,
                command=self.options.record_command, shares=self._shares, **common,
            )
            for row in rows
        ]  # fmt: skip

    @property
    def _beside_level(self) -> float:
        """The share that each of this run's rows has that are compared with those of a commit, both modes counted."""
        rows = len(self.options.recipes) * len(self.options.batch_sizes) * 2 * len(metrics_of(gates.AGAINST))
        return gates.LEVEL / 2 / rows

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
                raise MetricError(f"{row.recipe}: {row.key} was measured twice in one run")
            self.rows[row.recipe, row.key], self.verdicts[row.recipe, row.key] = row, verdict
        self._write(*rows)

    def _begin(self, of: str, recipe: Recipe, params: Mapping[str, Any]) -> None:
        """Before a measurement: what it is of, so that a process that is killed within it leaves word of that."""
        if recipe.text not in self._ended:
            self._ended[recipe.text] = self._why_ended(recipe)
        data = self.context["data_hash"].get(of)
        begun = {"kind": "begin", "of": of, "recipe": recipe.text, "params": keys_of(params), "data": data}
        with suppress(JournalError):  # said by the rows, which are worth more
            self._write(*self._opening(), begun)

    def _opening(self) -> list[Mapping[str, Any]]:
        """The record of how the run starts, unless it is written."""
        if self._started:
            return []
        self._started = True
        context = {**self.context, **self._identity, "command": self.options.command, "base": self.source.label,
                   "schema": SCHEMA}  # fmt: skip
        return [{"kind": "run", "context": {**context, "data_hash": dict(context["data_hash"])}}]

    def announce(self) -> None:
        """Start the run in the journal, for other processes to go on with. Raises JournalError where it cannot be."""
        self._write(*self._opening())

    def reread(self) -> None:
        """Take what other processes have measured for this run by now as done."""
        resumed = resume(self.options.journal, self.journal.run)
        self._done = resumed.rows if resumed else {}

    def _why_ended(self, recipe: Recipe) -> str | None:
        """A recipe belongs to one worker; another of the same run that has begun it came to its end in it."""
        if not self.options.began:
            return None
        for each in read(self.options.journal).records:
            mine = each["run"] == self.journal.run and each["time"] >= self.options.began
            if mine and each["kind"] == "begin" and each["recipe"] == recipe.text:
                return (
                    f"a worker was killed, or lost its device, while measuring {recipe}; this run does not try it "
                    "again, "
                    "a run with --resume does"
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
            # it may have been begun by several workers, one after another
            lost = [row for row in lost if (row.recipe, row.key) not in self.rows]
            for row, verdict in zip(found, self._judge(found), strict=True):
                self.rows[row.recipe, row.key], self.verdicts[row.recipe, row.key] = row, verdict
            self._record(lost, self._judge(lost))

    @staticmethod
    def _assert(found: "Sequence[Verdict]") -> None:
        __tracebackhide__ = True  # the messages say what failed, not where this was noticed
        if failing := [verdict.words for verdict in found if verdict.fails]:
            raise AssertionError("\n".join(map(terminal, failing)))

    def finish(self, passed: bool, interrupted: bool = False) -> list[str]:
        """Look for missing rows, write verdicts, update the baselines if requested; return what fails, as messages.

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
                self.proposals = gates.record(
                    self.options.baselines, self._recordable(), self.context, self.fingerprint, force=forced
                )
            else:
                failing.append(
                    "baselines were not updated: the run failed, and a failed run is not a baseline; --force-update "
                    "records what it did measure"
                )
        if self.rows:
            self.journal.end("interrupted" if interrupted else "passed" if passed and not failing else "failed")
        return failing

    def _recordable(self) -> list[Row]:
        """The rows of measurements of which nothing was refused: of half a one, the other half would look gone."""

        def measurement(row: Row) -> tuple[str, str, str]:
            return row.of, row.recipe, row.key.removeprefix(row.metric)

        half = {measurement(row) for row in self.rows.values() if _is_refused(row)}
        return [row for row in self.rows.values() if measurement(row) not in half and row.of != gates.AGAINST]


def _is_refused(row: Row) -> bool:
    """A time that was not taken because workers share the device: no fault, whatever a baseline has."""
    return row.status == "not_available" and str(row.reason).startswith(REFUSED)


def _ended(row: Row) -> bool:
    """Whether a row is not measured again: it has a value, or is what engines never tell."""
    untold = row.status == "not_available" and row.runtime != NATIVE and not _is_refused(row)
    return row.status in MEASURED or untold
