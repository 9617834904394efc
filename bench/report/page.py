"""The report as a page: one HTML file that needs no network and no other file.

What is known before anybody looks is set as HTML and SVG here: overview, fronts, charts, the papers' tables, the
environment. Cards of methods and the history are made from the page's data when they are opened. Data is in the page
once, as JSON: every value as the journal has it, with the text that is shown for it. Layers and history are JSON behind
gzip and base64; the history has `past.DIGITS` digits.
"""

import base64
import gzip
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from markupsafe import Markup

from bench.report import escaping, figures, trend
from bench.report.cells import number
from bench.report.commands_to_type import settings_of
from bench.report.overview import FAMILY_NAMES, Overview, family, spelled
from bench.report.tables import by_device, newest, tables
from bench.results.bases import label_of
from bench.results.records import Contents
from bench.results.row import Row
from bench.statistics import paired
from compression.recipes.recipe import UNCOMPRESSED

MARKS = {  # of verdicts, worst first: a sign, and a colour of the style sheet
    "regressed": ("✗", "bad"), "missing": ("✗", "bad"), "invalid": ("✗", "bad"), "inconclusive": ("?", "warn"),
    "improved": ("▲", "good"), "pass": ("✓", "good"), "not_comparable": ("-", "mute"), "new": ("+", "mute"),
    "no_baseline": ("-", "mute"),
}  # fmt: skip


def page(rows: Sequence[Row], contents: Contents, storage: Path = Path(".benchmarks")) -> str:
    """The page of these rows, with verdicts, layers and history from the journal that they are of.

    Args:
        rows: of any number of runs, bases and devices; the newest of each kind is shown. They and `contents` are as
            `bench.results.bases.told_apart` gives them.
        storage: folder of pytest-benchmark; one that is not there has no history.

    Raises:
        ValueError: there are no rows, or rows of several bases have one name.
        JournalError: the storage holds files that are not pytest-benchmark's.
    """
    if not rows:
        raise ValueError(
            "there are no results to show; measure something first, for example with pytest bench -m efficiency"
        )
    current = newest(rows)
    bases = list(dict.fromkeys(row.base for row in current))
    notes = Notes.of(contents, {row.run for row in current})
    called = {(label_of(row.base, row.base_hash), row.base_hash): row.base for row in current}
    runs, rounds = trend.runs(contents.records), trend.stored(storage, called)
    subjects = [
        subject(place, base, device, own, notes)
        for place, ((base, device), own) in enumerate(by_device(current).items())
    ]
    data = {"subjects": [each.pop("data") for each in subjects], "marks": MARKS}
    layers = [
        [notes.layers.get((each["base"], each["device"], line["recipe"]), {}) for line in each["lines"]]
        for each in subjects
    ]
    values = _of_bases(trend.history(contents.records), bases)
    past_data = {
        "journal": {"runs": [_short_run(each) for each in runs], "values": values},
        "pytest-benchmark": {"runs": rounds[0], "values": _of_bases(rounds[1], bases)},
    }
    recipes = list(dict.fromkeys(row.recipe for row in current))
    families = list(dict.fromkeys(family(each) for each in recipes))
    return _template().render(
        subjects=subjects, runs=runs, rounds=len(rounds[0]), recipes=recipes,
        bases=bases,
        families=[(each, FAMILY_NAMES[each]) for each in FAMILY_NAMES if each in families],
        family_names=FAMILY_NAMES, marks=MARKS, metrics=len({row.metric for row in current}),
        data=Markup(escaping.json_in_html(data)), layers=_packed(layers), past=_packed(past_data),
        style=_file("page.css"), script=_file("page.js"),
    )  # fmt: skip


@dataclass(frozen=True)
class Notes:
    """What a journal says beside its rows, the last of each.

    Attributes:
        verdicts: by run, recipe and key of a row.
        layers: by base, device and recipe.
        contexts: of runs, by base and device.
    """

    verdicts: Mapping[tuple[str, str, str], Mapping[str, Any]]
    layers: Mapping[tuple[str, str, str], Mapping[str, Any]]
    contexts: Mapping[tuple[str, str], Mapping[str, Any]]

    @classmethod
    def of(cls, contents: Contents, runs: Collection[str]) -> Self:
        """Of the verdicts those of these runs."""
        found = cls({}, {}, {})
        for record in contents.records:
            if record["kind"] == "verdict" and record["run"] in runs:
                found.verdicts[record["run"], record["recipe"], record["key"]] = record
            elif record["kind"] == "layers":
                known = {name: record[name] for name in ("executed", "seconds", "kernels", "layers")}
                known["notes"] = record.get("notes", [])  # which journals of earlier versions have not
                found.layers[record["base"], record["device"], record["recipe"]] = known
            elif record["kind"] == "run":
                context = record["context"]
                found.contexts[context.get("base", ""), context.get("fingerprint", "")] = context
        return found

    def verdict(self, row: Row) -> Mapping[str, Any]:
        return self.verdicts.get((row.run, row.recipe, row.key), {})

    def missing(self, recipe: str, rows: Sequence[Row]) -> list[Mapping[str, Any]]:
        """Verdicts of the runs of these rows on what should have been measured and was not, then or later."""
        runs, keys = {row.run for row in rows}, {row.key for row in rows}
        return [verdict for (run, of, key), verdict in self.verdicts.items()
                if verdict["outcome"] == "missing" and of == recipe and run in runs and key not in keys]  # fmt: skip


def subject(place: int, base: str, device: str, rows: Sequence[Row], notes: Notes) -> dict[str, Any]:
    """All that the page shows of one base on one device; `data` is what the page's script reads."""
    own: dict[str, list[tuple[Row, Mapping[str, Any]]]] = {UNCOMPRESSED: []}
    for row in rows:
        own.setdefault(row.recipe, []).append((row, notes.verdict(row)))
    if not own[UNCOMPRESSED] and all(row.base_value is None for row in rows):
        del own[UNCOMPRESSED]
    table, lines, context = Overview(rows), [], notes.contexts.get((base, device), {})
    cells = table.cells(list(own))
    for recipe, judged in own.items():
        found = [verdict for _, verdict in judged if verdict] + notes.missing(recipe, [row for row, _ in judged])
        outcomes = Counter(verdict["outcome"] for verdict in found)
        lines.append({
            "recipe": recipe, "family": family(recipe), "anchor": f"m{place}-{len(lines)}", "cells": cells[recipe],
            "counts": {mark: outcomes[mark] for mark in MARKS if outcomes[mark]},
            "failing": [verdict["words"] for verdict in found if MARKS[verdict["outcome"]][1] == "bad"],
        })  # fmt: skip
    return {
        "base": base, "device": device, "place": place, "lines": lines,
        "heads": [(column.head, spelled(condition)) for column, condition in table.conditions.items()],
        "by_ratio": table.by_ratio,
        "fronts": figures.fronts(table, {line["recipe"]: line["anchor"] for line in lines}, base),
        "orders": figures.orders(rows), "rag": figures.rag(table, rows),
        "tables": tables(rows, settings_of(context)),
        "environment": _flat(context),
        "counts": {mark: n for mark in MARKS if (n := sum(line["counts"].get(mark, 0) for line in lines))},
        "data": {"base": base, "device": device, "recipes": {
            recipe: [_row(row, verdict) for row, verdict in judged] for recipe, judged in own.items()
        }},
    }  # fmt: skip


def _row(row: Row, verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the page's script reads it; what it does not have is left out."""
    outcome = verdict.get("outcome")
    found = {
        "metric": row.metric, "unit": row.unit,
        "params": spelled(_called(row)),
        "value": row.value, "text": None if row.value is None else number(row.value),
        "ratio": None if row.ratio is None else f"{row.ratio:.3f}", "run": row.run,
        "apart": _apart(row), "status": None if row.status == "ok" else row.status,
        "reason": row.remark, "verdict": outcome, "words": verdict.get("words") if outcome != "pass" else None,
    }  # fmt: skip
    return {name: each for name, each in found.items() if each not in (None, "")}


def _called(row: Row) -> dict[str, Any]:
    """The parameters of a row, before a digest what that is of."""
    names = {name: each.name for name, each in row.inputs.items() if row.params.get(name) == each.key != each.name}
    return {name: f"{names[name]} ({value})" if name in names else value for name, value in row.params.items()}


def _apart(row: Row) -> str | None:
    """The paired difference to the base of the same run, where the row has one."""
    known = row.paired is not None and {"difference", "low", "high", "items", "p"} <= row.paired.keys()
    return paired.words(dict(row.paired)) if known else None


def _short_run(run: Mapping[str, Any]) -> dict[str, Any]:
    return {name: run[name] for name in ("run", "time", "commit") if run.get(name)}


def _of_bases(history: Mapping[str, Any], bases: Sequence[str]) -> dict[str, Any]:
    return {base: history[base] for base in bases if base in history}


def _flat(context: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Names and values of a run's context, tables within it line by line."""
    found = []
    for name, value in context.items():
        label = f"{before}{name}".replace("_", " ")
        found += _flat(value, f"{label}: ") if isinstance(value, Mapping) else [(label, str(value))]
    return found


def _packed(data: Any) -> str:
    """JSON behind gzip and base64: what is read only when it is asked for, and would be most of the page's weight."""
    return base64.b64encode(gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)).decode()


def _file(name: str) -> Markup:
    return Markup(files(__package__).joinpath("templates", name).read_text())


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def shown(value: Any) -> Any:
        return Markup(escaping.html(value)) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, finalize=shown)  # fmt: skip
    return environment.get_template("page.html")
