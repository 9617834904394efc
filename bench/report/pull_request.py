"""One run in a few lines of Markdown, as a comment on a pull request: verdicts first, then changes.

`python -m bench digest` prints it for the last run of a journal; with `--report DIR` it is DIR/summary.md.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.report.cells import Notes, by_ratio, cell_of, choose, with_base
from bench.report.escaping import code, markdown
from bench.report.layout import Column
from bench.report.recipe_lists import ALL
from bench.results.records import Contents
from bench.results.row import Row
from compression.recipes.recipe import UNCOMPRESSED

LIMIT = 65_536  # characters of a comment on GitHub
SHOWN = 8  # of each kind of lines
WORDS = 300  # characters of one verdict or reason

FAILING = ("regressed", "missing", "invalid")
MOVED = ("improved", "inconclusive")
UNCOMPARED = "not_comparable"
_NAMED = re.compile(r" (?:not compared|is not available here|cannot be compared[\w ]*): ")  # between row and reason
_NUMBERS = (
    Column(head="Size (MiB)", metric="efficiency.model_size_gb", scale=1024),
    Column(head="Latency (ms/tok)", metric="efficiency.latency_ms", params=(("mode", "eager"), ("batch", 1))),
    Column(head="Perplexity", metric="quality.perplexity"),
    Column(head="Accuracy", metric="quality.average_accuracy"),
    Column(head="RAG F1", metric="rag.f1", params=(("decoding", "greedy"),)),
    Column(head="Recovered", metric="recovery.score_after"),
    Column(head="G-Eval", metric="judge.g_eval"),
)


def digest(contents: Contents, run: str | None = None) -> str:
    """A run of a journal, by default its last one with results: at most `LIMIT` characters, normally below 40 lines.

    Raises JournalError where there is no such run.
    """
    rows = contents.rows_of(run)
    run = rows[-1].run
    records = [record for record in contents.records if record["run"] == run]
    verdicts = list({(each["recipe"], each["key"]): each for each in records if each["kind"] == "verdict"}.values())
    parts = [
        [_head(records, rows), _counted(verdicts)],
        *(_listed(verdicts, outcomes, what) for outcomes, what in ((FAILING, "Fails"), (MOVED, "Moved"))),
        _uncompared(verdicts),
        numbers(rows, 1 + SHOWN),
        _unmeasured(rows),
    ]
    text = "\n\n".join("\n".join(part) for part in parts if part) + "\n"
    if len(text) > LIMIT:
        cut = f"\n\n(cut at {LIMIT:,} characters)\n"
        text = text[: LIMIT - len(cut)] + cut
    return text


def _head(records: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    context = next((record["context"] for record in records if record["kind"] == "run"), {})
    endings = [record["status"] for record in records if record["kind"] == "end"]
    state = endings[-1] if endings else "has not ended"
    recipes = dict.fromkeys(row.recipe for row in rows)
    what = f"{len(recipes)} recipe{'s' * (len(recipes) > 1)} on {code(rows[0].base)}, {code(rows[0].device)}"
    commit = f", commit {markdown(context['commit'])}" if context.get("commit") else ""
    return f"## Compression benchmarks: {markdown(state)}\n\n{what}{commit}, run {markdown(rows[0].run)}"


def _counted(verdicts: Sequence[Mapping[str, Any]]) -> str:
    if not verdicts:
        return "\nNothing was gated: this run has no verdicts."
    counts = Counter(each["outcome"] for each in verdicts)
    order = [*FAILING, *MOVED, *sorted(counts.keys() - {*FAILING, *MOVED})]
    return "\n" + ", ".join(f"{counts[each]} {each.replace('_', ' ')}" for each in order if counts[each])


def _listed(verdicts: Iterable[Mapping[str, Any]], outcomes: Sequence[str], what: str) -> list[str]:
    found = [each for outcome in outcomes for each in verdicts if each["outcome"] == outcome]
    if not found:
        return []
    return [f"**{what}**", "", *_bullets(each["words"] for each in found)]


def _uncompared(verdicts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Each reason once, with the number of rows that it holds for."""
    words = [each["words"] for each in verdicts if each["outcome"] == UNCOMPARED]
    counts = Counter(_NAMED.split(each, maxsplit=1)[-1] for each in words)
    if not counts:
        return []
    said = (f"{count} row{'s' * (count > 1)}: {reason}" for reason, count in counts.most_common())
    return ["**Not compared**", "", *_bullets(said)]


def _bullets(texts: Iterable[str]) -> list[str]:
    texts = list(dict.fromkeys(texts))
    more = [f"- and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return [f"- {_short(text)}" for text in texts[:SHOWN]] + more


def _short(text: str) -> str:
    text = " ".join(text.split())
    return markdown(text if len(text) <= WORDS else text[: WORDS - 1] + "…")


def numbers(rows: Sequence[Row], most: int | None = None) -> list[str]:
    """The few numbers that matter, a line of Markdown for each recipe: the base, and the first ones or all."""
    rows = with_base(rows)
    chosen = {column: choose(column, (), [row for row in rows if row.metric == column.metric]) for column in _NUMBERS}
    chosen = {column: choice for column, choice in chosen.items() if choice.conditions}
    if not chosen:
        return []
    place = {recipe: at for at, recipe in enumerate(ALL)}
    recipes = sorted(dict.fromkeys(row.recipe for row in rows), key=lambda each: place.get(each, len(place)))
    lines = [f"| | {' | '.join(column.head for column in chosen)} |", f"|:---|{'---:|' * len(chosen)}"]
    for recipe in recipes[:most]:
        cells = []
        for column, choice in chosen.items():
            row = choice.rows.get((recipe, ()))
            shown = "not measured" if row is None else markdown(cell_of(column, row, Notes()).text)
            cells.append(shown + (f" ({row.ratio:.3g}x)" if row is not None and row.ratio is not None else ""))
        lines.append(f"| {markdown(recipe)} | {' | '.join(cells)} |")
    if most is not None and len(recipes) > most:
        lines += ["", f"and {len(recipes) - most} more recipes"]
    if UNCOMPRESSED in recipes:
        words = ["In brackets [95 % interval], (ratio to fp16).", by_ratio(chosen)]
        lines += ["", " ".join(filter(None, words))]
    return lines


def _unmeasured(rows: Iterable[Row]) -> list[str]:
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.value is None:
            found.setdefault(f"{row.of}: {row.status.replace('_', ' ')}: {row.reason}", set()).add(row.recipe)
    said = [f"{text} ({len(recipes)} recipe{'s' * (len(recipes) > 1)})" for text, recipes in found.items()]
    return ["**Could not be measured**", "", *_bullets(said)] if said else []
