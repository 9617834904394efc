"""Sources of results: a journal, or the recorded baselines, which are there right after a clone."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bench.errors import BaselineError
from bench.gate.baseline import ANYWHERE, Baseline
from bench.gate.entry import Entry
from bench.results.bases import Identity, rows_told_apart
from bench.results.item_pairs import compare, mismatch
from bench.results.row import Row
from compression.recipes.recipe import UNCOMPRESSED

RECORDED = "baseline"  # the run of such rows


def recorded(directory: str | Path) -> list[Row]:
    """All recorded rows: for each device its own, and with them those that no device changes.

    A base of which no device has rows of its own stands under the device "any". Paired differences are those of the
    items that lie beside the baselines. Raises BaselineError where there is nothing, or a file is damaged.
    """
    files = sorted(Path(directory).glob("*/*.json"))
    if not files:
        raise BaselineError(f"{directory} has no baselines; record them with pytest bench --update-baselines")
    found = [Baseline.load(file) for file in files]
    devices: dict[Identity, dict[str, None]] = {}
    for each in found:
        devices.setdefault(each.identity, {}).update(dict.fromkeys(each.devices))
    return rows_told_apart(
        row for each in found for device in devices[each.identity] or ["any"] for row in _rows(each, device, found)
    )


def _rows(baseline: Baseline, device: str, others: Iterable[Baseline]) -> list[Row]:
    plain = next((each for each in others if (each.identity, each.recipe) == (baseline.identity, UNCOMPRESSED)), None)
    rows = []
    for place in (ANYWHERE, device):
        section = baseline.sections.get(place)
        for key, entry in (section.rows if section else {}).items():
            row = Row(
                run=RECORDED, base=baseline.base, base_hash=baseline.base_hash, recipe=baseline.recipe,
                device=device, metric=entry.metric, value=entry.value, unit=entry.unit, better=entry.better,
                ratio=entry.ratio, base_value=entry.base_value, samples=entry.samples, base_samples=entry.base_samples,
                params=entry.params, seed=int(entry.context.get("seed") or 0), status=entry.status,
                reason="estimated when it was recorded" if entry.status != "ok" else None, of=entry.of,
                items=entry.items, inputs=entry.inputs, compute_dtype=entry.compute_dtype,
            )  # fmt: skip
            before = plain.sections[ANYWHERE].rows.get(key) if plain and ANYWHERE in plain.sections else None
            rows.append(row if baseline is plain else _paired(row, before))
    return rows


def _paired(row: Row, before: Entry | None) -> Row:
    if row.items is None or before is None or before.items is None or mismatch(row.items, before.items):
        return row
    return replace(row, paired=compare(row.items, before.items).to_json())
