"""Records baselines: proposes every change before it is written, from a run or from another set of baselines.

Every change of the files is a `Proposal` first: what a baseline is and what it would be, and each row that moves
between them. `python -m bench baselines` shows proposals before it writes them; `pytest --update-baselines` after.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.errors import BaselineError
from bench.gate.baseline import ANYWHERE, ITEMS, Baseline, Section, gone, unusable
from bench.gate.entry import Entry, conditions, stamped
from bench.gate.words import arrow, percent, relative, shown
from bench.metrics import Metric, all_metrics
from bench.results import items as stored
from bench.results.bases import OLD
from bench.results.row import Row
from compression.checkpoints.base import is_name

MIGRATE = (
    "the base_hash of a schema 1 baseline does not cover the tokenizer; `python -m bench baselines migrate` checks "
    "it against the base and rewrites it"
)
_SAME = 1e-9  # relative: printing and summing in another order
DIRECTIONS = ("worse", "better", "moved", "dropped", "new")  # in the order in which they are said


@dataclass(frozen=True, kw_only=True)
class Change:
    """A row that is new, that moved, or that goes; `then` or `now` is None where there was or will be none."""

    recipe: str
    key: str
    then: Entry | None
    now: Entry | None
    tolerance: float = 0.0  # the share that the row may move before the gate calls it a change
    floor: float = 0.0  # in its unit: no smaller difference is a change
    where: str = ""  # the device, where there are several
    why: str = "it no longer exists"  # of rows that go

    @property
    def direction(self) -> str:
        """One of DIRECTIONS, of the ratio where both have one; `moved` where neither direction is better."""
        if self.then is None or self.now is None:
            return "new" if self.then is None else "dropped"
        then, now = self._numbers()
        if self.now.better == "neither" or then == now:
            return "moved"
        return "better" if (now < then) == (self.now.better == "lower") else "worse"

    @property
    def within(self) -> bool:
        """Whether it moved no more than the tolerance of its metric."""
        if self.then is None or self.now is None:
            return False
        small = abs(self.now.value - self.then.value) <= self.floor
        return small or abs(relative(*self._numbers())) <= max(self.tolerance, _SAME)

    def _numbers(self) -> tuple[float, float]:
        if self.then.ratio is not None and self.now.ratio is not None:
            return self.then.ratio, self.now.ratio
        return self.then.value, self.now.value

    @property
    def words(self) -> str:
        """What happens to the row, by how much, and in which direction."""
        name = f"{self.recipe}: {self.key}{self.where}"
        if self.now is None:
            return f"{name} dropped: {self.why}"
        if self.then is None:
            return f"{name} new: {self.now.value:.4g} {self.now.unit}"
        said = f"{name} {self.direction}: {shown(self.then.value, self.now.value, self.now.unit)}"
        if self.then.ratio is not None and self.now.ratio is not None and self.then.ratio != self.now.ratio:
            then, now = self.then.ratio, self.now.ratio
            said += f", ratio to fp16 {arrow(then, now)} ({percent(relative(then, now))})"
        return said + (", within its tolerance" if self.within and self.tolerance else "")


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One baseline as it is and as it would be; None where there is, or will be, no file."""

    old: Baseline | None
    new: Baseline | None
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()  # what else there is to say

    @property
    def words(self) -> list[str]:
        """Every change, worse ones first and those within their tolerance last; rows that go for one reason as one."""
        return self._words(self.changes)

    @property
    def notable(self) -> list[str]:
        """The same without rows that are new or within their tolerance."""
        return self._words([each for each in self.changes if each.direction != "new" and not each.within])

    def _words(self, changes: Sequence[Change]) -> list[str]:
        drops = Counter(each.why for each in changes if each.direction == "dropped")
        recipe = (self.new or self.old).recipe
        said = [f"{recipe}: {n} recorded rows dropped: {why}" for why, n in drops.items() if n > 1]
        single = [each for each in changes if each.direction != "dropped" or drops[each.why] == 1]
        ordered = sorted(single, key=lambda each: (each.within, DIRECTIONS.index(each.direction)))
        return [*said, *(each.words for each in ordered), *self.notes]

    @property
    def summary(self) -> str:
        """How many rows go which way."""
        recipe = (self.new or self.old).recipe
        counts = Counter("within tolerance" if each.within else each.direction for each in self.changes)
        rows = sum(len(section.rows) for section in (self.new or self.old).sections.values())
        as_before = rows - sum(each.now is not None for each in self.changes) if self.new else 0
        parts = [f"{counts[name]} {name}" for name in (*DIRECTIONS, "within tolerance") if counts[name]]
        return f"{recipe}: {', '.join([*parts, f'{as_before} as before'])}"


def compared(
    old: Baseline | None, new: Baseline | None, *, metrics: Mapping[str, Metric] | None = None, why: str | None = None
) -> list[Change]:
    """Every row whose number differs between two baselines of one recipe, in order of place and key."""
    metrics = all_metrics() if metrics is None else metrics
    recipe = (new or old).recipe
    then, now = ({} if each is None else each.sections for each in (old, new))
    devices = {*then, *now} - {ANYWHERE}
    changes = []
    for place in sorted({*then, *now}):
        before, after = (each[place].rows if place in each else {} for each in (then, now))
        for key in sorted({*before, *after}):
            was, is_now = before.get(key), after.get(key)
            if was is not None and is_now is not None and (was.value, was.ratio) == (is_now.value, is_now.ratio):
                continue
            metric = metrics.get(key.partition("[")[0])
            facts = {"tolerance": metric.rel, "floor": metric.floor} if metric else {}
            facts |= {"where": f" on {place}"} if place != ANYWHERE and len(devices) > 1 else {}
            facts |= {"why": why} if why else {}
            changes.append(Change(recipe=recipe, key=key, then=was, now=is_now, **facts))
    return changes


def update(
    directory: str | Path,
    rows: Iterable[Row],
    context: Mapping[str, Any],
    fingerprint: str,
    *,
    metrics: Mapping[str, Metric] | None = None,
    force: bool = False,
) -> list[str]:
    """Record rows, merged into what is there, and say in words what changed; see `recorded`."""
    proposals = record(directory, rows, context, fingerprint, metrics=metrics, force=force)
    return [words for each in proposals for words in each.words]


def record(
    directory: str | Path,
    rows: Iterable[Row],
    context: Mapping[str, Any],
    fingerprint: str,
    *,
    metrics: Mapping[str, Metric] | None = None,
    force: bool = False,
) -> list[Proposal]:
    """Record rows, merged into what is there: the proposals that were written; see `recorded`."""
    proposals = recorded(directory, rows, context, fingerprint, metrics=metrics, force=force)
    write(directory, proposals)
    return proposals


def recorded(
    directory: str | Path,
    rows: Iterable[Row],
    context: Mapping[str, Any],
    fingerprint: str,
    *,
    metrics: Mapping[str, Metric] | None = None,
    force: bool = False,
) -> list[Proposal]:
    """What recording the rows of a run would make of the baselines, by base and recipe.

    A recorded row stays unless it is measured again, or cannot be: its checkpoint or data changed (`base_hash`,
    `data_hash`), or its measurement no longer yields it. Raises BaselineError for a row that cannot be a baseline; with
    `force` it is left out instead, and that is said, and the context says `forced`.
    """
    metrics = all_metrics() if metrics is None else metrics
    context = {**context, "forced": True} if force else context
    context = {name: each for name, each in context.items() if name != "command"}  # it may hold local paths
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status == "not_available":  # there is nothing to record, and nothing wrong
            continue
        if str(row.base_hash).startswith(OLD):
            raise BaselineError(
                f"{row.recipe}: {row.key} was measured before base_hash covered the tokenizer, so its base is "
                "unknown; measure it again"
            )
        if None not in (row.base_hash, context.get("base_hash")) and row.base_hash != context["base_hash"]:
            raise BaselineError(f"{row.recipe}: {row.key} belongs to another base than its run: {row.base_hash}")
        group = groups.setdefault((row.base, row.recipe), {})
        why = "it occurs twice" if row.key in group else unusable(row, metrics.get(row.metric), fingerprint)
        if why and not force:
            raise BaselineError(f"{row.recipe}: {row.key} cannot be recorded: {why}; nothing was written")
        if why:
            notes.setdefault((row.base, row.recipe), []).append(f"{row.recipe}: {row.key} not recorded: {why}")
        else:
            group[row.key] = row
    proposals = []
    for (base, recipe), group in sorted(groups.items()):
        old = _before(directory, base, recipe, context.get("base_hash"))
        measured = list(group.values())
        data = {row.of: conditions(context, row.of)["data_hash"] for row in measured}
        kept, stale = without(old, lambda _, entry, data=data: _stale(entry, context.get("base_hash"), data))
        vanished = gone(measured, kept, fingerprint)
        kept, unmeasured = without(
            kept, lambda at, _, vanished=vanished: "it is no longer measured" if at in vanished else None
        )
        new = _with(kept, measured, context, fingerprint, metrics)
        proposals.append(
            Proposal(
                old=old,
                new=new,
                changes=(*stale, *unmeasured, *compared(kept, new, metrics=metrics)),
                notes=tuple(notes.get((base, recipe), ())),
            )
        )
    return proposals


def merged(directory: str | Path, other: Baseline, *, metrics: Mapping[str, Metric] | None = None) -> Proposal:
    """What the rows of another baseline, as of another machine, would make of the one that is there: they replace its.

    Rows of another checkpoint than theirs, or of other data, go.
    """
    old, base_hash = _before(directory, other.base, other.recipe, other.base_hash), other.base_hash
    theirs = [entry for section in other.sections.values() for entry in section.rows.values()]
    data = {entry.of: entry.context["data_hash"] for entry in theirs}
    kept, stale = without(old, lambda _, entry: _stale(entry, base_hash, data))
    sections = dict(kept.sections)
    for place, section in other.sections.items():
        own = sections[place].rows if place in sections else {}
        sections[place] = replace(section, rows=own | section.rows)
    new = replace(kept, sections=sections)
    return Proposal(old=old, new=new, changes=(*stale, *compared(kept, new, metrics=metrics)))


def write(directory: str | Path, proposals: Iterable[Proposal]) -> None:
    """Make the files what the proposals say; a baseline without rows has none. Raises BaselineError where it cannot."""
    for each in proposals:
        path = each.old.file(directory) if each.old is not None and each.old.sections else None
        left = each.new is not None and any(section.rows for section in each.new.sections.values())
        if (left and each.new.save(directory) == path) or path is None:
            continue  # else there is no file any more, or another: a folder's base got its digits
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise BaselineError(f"baseline {path} cannot be removed: {error.strerror or error}") from None
        stored.remove(path.parent / ITEMS, path.stem)


def _before(directory: str | Path, base: str, recipe: str, base_hash: str | None) -> Baseline:
    """What is recorded where these rows go: of a name its baseline, of a folder that of this base alone.

    Raises BaselineError where one is of schema 1 and the other is not: nothing tells whether they are of one base.
    """
    found = Baseline.find(directory, base, recipe, base_hash)
    then = None if found is None else found.base_hash
    if found is None or (not is_name(base) and None not in (then, base_hash) and then != base_hash):
        return Baseline(base=base, recipe=recipe)
    if None not in (then, base_hash) and then.startswith(OLD) != base_hash.startswith(OLD):
        raise BaselineError(f"{recipe} on {base}: {MIGRATE}; nothing was written")
    return found


def without(old: Baseline, reason: Callable[[tuple[str, str], Entry], str | None]) -> tuple[Baseline, list[Change]]:
    """The baseline without the rows of which `reason` of place and key, and of the row, says why; and these."""
    sections, dropped = {}, []
    for place, section in old.sections.items():
        whys = {key: reason((place, key), entry) for key, entry in section.rows.items()}
        dropped += [
            Change(recipe=old.recipe, key=key, then=section.rows[key], now=None, why=why)
            for key, why in whys.items()
            if why
        ]
        sections[place] = replace(section, rows={key: section.rows[key] for key, why in whys.items() if not why})
    return replace(old, sections={place: each for place, each in sections.items() if each.rows}), dropped


def _stale(entry: Entry, base_hash: str | None, data: Mapping[str, str | None]) -> str | None:
    """Why an entry can never be compared again: another checkpoint, or other data where that kind was measured now."""
    for name, now in (("base_hash", base_hash), ("data_hash", data.get(entry.of))):
        then = entry.context[name]
        if None not in (then, now) and then != now:
            return f"{name} was {then!r}, is {now!r}"
    return None


def _with(
    old: Baseline, rows: list[Row], context: Mapping[str, Any], fingerprint: str, metrics: Mapping[str, Metric]
) -> Baseline:
    """The baseline with these rows in the place of those of their keys."""
    sections = {place: replace(section, rows=dict(section.rows)) for place, section in old.sections.items()}
    for row in sorted(rows, key=lambda each: each.key):
        metric = metrics[row.metric]
        place = fingerprint if metric.per_device else ANYWHERE
        entries = sections[place].rows if place in sections else {}
        entries[row.key] = Entry.of_row(row, metric, context, fingerprint)
        sections[place] = Section(context=stamped(context, fingerprint, row.seed), rows=entries)
    return replace(old, sections=sections)
