"""Writes the report: the newest row of each key for one base and device, from a journal or recorded baselines.

    tables.md  tables.tex  tables.html               the papers' tables (`bench.report.tables`)
    results.parquet  results.csv  results.json       every row that they are of
    summary.md                                       the last run in a few lines (`bench.report.pull_request`)
    index.html                                       the page (`bench.report.page`)

`python -m bench report` writes them in seconds and measures nothing; `pytest bench ... --report DIR` does at its end.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import JournalError, OptionError
from bench.files import write_whole
from bench.report import escaping, formats
from bench.report.commands_to_type import settings_in
from bench.report.page import page
from bench.report.pull_request import digest, numbers
from bench.report.sources import recorded
from bench.report.tables import Table, by_device, newest, tables
from bench.results.bases import DEFAULT_BASE, told_apart
from bench.results.journal import read
from bench.results.records import Contents
from bench.results.row import Row

if TYPE_CHECKING:
    import pandas as pd

_LEFT_OUT = ("items", "schema")  # of rows: the former is in the journal, and large
_AS_JSON = ("params", "inputs", "samples", "base_samples", "paired", "source")
_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }}
figure {{ margin: 2rem 0; overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
caption {{ text-align: left; font-weight: bold; padding: .3rem }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap }}
th:first-child {{ text-align: left }}
figcaption {{ font-size: 85% }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write(directory: Path, rows: Sequence[Row], contents: Contents | None = None, run: str | None = None) -> list[Path]:
    """Write the report of rows of one base and device, and say which files.

    Args:
        contents: the journal that the rows are of; without one there are no verdicts, and neither summary nor page.
        run: that the summary is of; by default the last one.

    Raises:
        ValueError: rows of several bases or devices.
        RecipeError: a recipe that this version does not know.
        OptionError: a file cannot be written.
    """
    rows = newest(rows)
    made = tables(rows, settings_in(contents, rows[-1]))
    title = f"{rows[0].base} on {rows[0].device}"
    texts = {
        "tables.md": "\n".join(
            [f"# {escaping.markdown(title)}\n", "## In short\n", *numbers(rows), "", *map(formats.markdown, made)]
        ),
        "tables.tex": "% needs booktabs and graphicx\n" + "\n".join(map(formats.latex, made)),
        "tables.html": _HTML.format(title=escaping.html(title), body="\n".join(map(formats.html, made))),
        "results.json": json.dumps([_plain(row) for row in rows], indent=1) + "\n",
    }
    if contents is not None:
        texts["summary.md"] = digest(contents, run)
        texts["index.html"] = page(rows, contents)
    frame = results(rows)
    writable(directory)
    try:
        for name, text in texts.items():
            write_whole(directory / name, text.encode())
        write_whole(directory / "results.csv", frame.map(escaping.csv_cell).to_csv(index=False).encode())
        write_whole(directory / "results.parquet", frame.to_parquet(index=False))
    except OSError as error:
        raise OptionError(
            f"--report {directory}: the report cannot be written: {error.strerror or error}; choose another folder"
        ) from None
    return [directory / name for name in (*texts, "results.csv", "results.parquet")]


def writable(directory: Path) -> None:
    """Make the folder of a report before anything is measured for it. Raises OptionError where that cannot be."""
    try:
        place = directory.resolve()  # the end of a link, which may be there or not
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        words = getattr(error, "strerror", None) or error
        raise OptionError(f"--report {directory}: {words}; choose another folder") from None


def _plain(row: Row) -> dict[str, Any]:
    return {"key": row.key} | {name: each for name, each in row.to_json().items() if name not in _LEFT_OUT}


def results(rows: Sequence[Row]) -> "pd.DataFrame":
    """A line for each row; what is a list or a table is text, JSON. Results per item stay in the journal."""
    import pandas as pd

    columns = ["key", *(each.name for each in fields(Row) if each.name not in _LEFT_OUT)]
    lines = [
        {name: json.dumps(each) if name in _AS_JSON and each is not None else each for name, each in found.items()}
        for found in map(_plain, rows)
    ]
    return pd.DataFrame(lines, columns=columns)


def measured(
    path: Path, base: str | None = None, device: str | None = None, base_hash: str | None = None
) -> tuple[list[Row], Contents]:
    """The newest rows of a journal for one base and device, those of its last row unless others are asked for.

    `base` is what the base is called among those of the journal (`results.bases`); or its label, with its `base_hash`.
    Raises JournalError where there are none, or for a bad journal.
    """
    return of_journal(read(path), str(path), base, device, base_hash)


def of_journal(
    written: Contents, source: str, base: str | None = None, device: str | None = None, base_hash: str | None = None
) -> tuple[list[Row], Contents]:
    """As `measured`, of a journal that is read already."""
    if base is not None and base_hash is not None:
        base = written.bases.names[base, base_hash]
    contents = told_apart(written)
    return chosen(newest(contents.each_row()), base, device, source), contents


def chosen(rows: Sequence[Row], base: str | None, device: str | None, source: str) -> list[Row]:
    """Rows of one base and device, those of the last row unless others are asked for.

    Raises JournalError, naming what there is, where there are none.
    """
    groups = by_device(rows)
    fitting = [row for row in rows if base in (None, row.base) and device in (None, row.device)]
    if not fitting:
        there = "; ".join(f"{base} on {device}" for base, device in groups) or "nothing"
        asked = " ".join(f"--{name} {text}" for name, text in (("base", base), ("device", device)) if text)
        raise JournalError(f"{source} has no results{f' for {asked}' if asked else ''}; it has {there}")
    return list(groups[fitting[-1].base, fitting[-1].device])


def chosen_of_baselines(directory: str | Path, base: str | None, device: str | None) -> list[Row]:
    """Recorded rows of one base and device: of the default base of a run if it is there and no other is asked for.

    Raises:
        BaselineError: there are no baselines, or a file is damaged.
        JournalError: naming what there is, where there are no such rows.
    """
    rows = recorded(directory)
    default = DEFAULT_BASE if any(row.base == DEFAULT_BASE for row in rows) else None
    return chosen(rows, base or default, device, str(directory))


def one_of(made: Sequence[Table], numbers: str) -> list[Table]:
    """The tables with these numbers, separated by commas. Raises OptionError for one that is not there."""
    wanted = [each.strip() for each in numbers.split(",")]
    there = {table.number for table in made}
    for number in wanted:
        if number not in there:
            raise OptionError(f"--tables {number}: there are {', '.join(sorted(there))}")
    return [table for table in made if table.number in wanted]
