"""One table as Markdown, LaTeX, HTML or plain text. The best values of a column are marked."""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from bench.report import escaping
from bench.report.cells import Cell
from bench.report.columns import WIDTH, blocks, wrapped
from bench.report.escaping import terminal
from bench.report.tables import NOT_MEASURED, Line, Table

if TYPE_CHECKING:
    import pandas as pd


def _frame(table: Table, line: Callable[[str], str], cell: Callable[[Cell], str]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(
        [[cell(each) for each in found.cells] for found in table.lines],
        index=pd.Index([line(found.name) for found in table.lines], name="Method"),
        columns=[line(head) for head in table.columns],
    )


def title(table: Table) -> str:
    """Number, title and family."""
    number = f"As table {table.number[3:]}" if table.number.startswith("as ") else f"Table {table.number}"
    return f"{number}: {table.title} ({table.family.replace('_', ' ')})"


def _reported(line: Line, columns: Iterable[str]) -> str:
    """A paper's line of another base in words: what it reports, and nothing else."""
    said = [
        f"{head} {cell.text}" + (f" ({cell.note})" if cell.note else "")
        for head, cell in zip(columns, line.cells, strict=True) if cell.value is not None
    ]  # fmt: skip
    return f"{line.name}: {', '.join(said)}"


def text(table: Table, width: int = WIDTH) -> str:
    """For a terminal: what was measured, the best marked with `*`, and the findings."""
    kept = [place for place in range(len(table.columns))
            if any(line.cells[place].text != NOT_MEASURED for line in table.lines)]  # fmt: skip
    lines = [
        (terminal(line.name), [terminal(line.cells[place].text) + "*" * line.cells[place].best for place in kept])
        for line in table.lines
        if any(line.cells[place].text != NOT_MEASURED for place in kept)
    ]
    heads = [terminal(table.columns[place]) for place in kept]
    said = [part for words in table.findings for part in wrapped(terminal(words), width)]
    return "\n".join([*wrapped(title(table), width), *blocks(heads, lines, width=width), *said])


def markdown(table: Table) -> str:
    """A heading, the table with the best in bold, its notes, and the command that measures it."""

    def cell(each: Cell) -> str:
        shown = escaping.markdown(each.text)
        return (f"**{shown}**" if each.best else shown) + (f" ({each.note})" if each.note else "")

    body = _frame(table, escaping.markdown, cell).to_markdown(disable_numparse=True)
    notes = [f"({place}) {note}" for place, note in enumerate(table.notes, 1)]
    below = [*table.findings, *notes, *table.remarks, *(_reported(line, table.columns) for line in table.elsewhere)]
    below += [f"Measured by `{table.command}`."] if table.command else []
    lines = "".join(f"- {_markdown(each)}\n" for each in below)
    return f"### {escaping.markdown(title(table))}\n\n{body}\n\n{lines}"


def latex(table: Table) -> str:
    """A `table` with booktabs and `\\resizebox` (graphicx), the best in bold."""

    def cell(each: Cell) -> str:
        shown = _latex(each.text)
        return (rf"\textbf{{{shown}}}" if each.best else shown) + (f"$^{{{each.note}}}$" if each.note else "")

    body = _frame(table, escaping.latex, cell).reset_index().to_latex(
        index=False, escape=False, column_format="l" + "r" * len(table.columns))  # fmt: skip
    notes = [f"$^{{{place}}}$ {_latex(note)}" for place, note in enumerate(table.notes, 1)]
    below = [*map(_latex, table.findings), *notes, *map(_latex, table.remarks),
             *(_latex(_reported(line, table.columns)) for line in table.elsewhere)]  # fmt: skip
    return "\n".join([
        r"\begin{table}[htbp]", r"\centering", rf"\caption{{{_latex(title(table))}}}", rf"\label{{tab:{table.name}}}",
        r"\resizebox{\linewidth}{!}{%", body.rstrip() + "}", *(rf"\par\footnotesize {each}" for each in below),
        r"\end{table}", "",
    ])  # fmt: skip


def html(table: Table) -> str:
    """A `figure` with the table, whose cells carry their number in `data-value`, and the notes below it."""

    def cell(each: Cell) -> str:
        shown = escaping.html(each.text)
        value = "" if each.value is None else f' data-value="{each.value!r}"'
        note = f"<sup>{each.note}</sup>" if each.note else ""
        return f"<td{value}>{f'<strong>{shown}</strong>' if each.best else shown}{note}</td>"

    heads = "".join(f'<th scope="col">{escaping.html(head)}</th>' for head in ("Method", *table.columns))
    body = "".join(
        f'<tr><th scope="row">{escaping.html(line.name)}</th>{"".join(map(cell, line.cells))}</tr>\n'
        for line in table.lines
    )
    below = [*table.findings, *table.remarks, *(_reported(line, table.columns) for line in table.elsewhere),
             *([f"Measured by {table.command}"] if table.command else [])]  # fmt: skip
    return (
        f'<figure id="{table.name}">\n<table>\n<caption>{escaping.html(title(table))}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n<figcaption>\n"
        + (f"<ol>{''.join(f'<li>{escaping.html(note)}</li>' for note in table.notes)}</ol>\n" if table.notes else "")
        + "".join(f"<p>{escaping.html(each)}</p>\n" for each in below)
        + "</figcaption>\n</figure>\n"
    )


def _words(words: str, escape: Callable[[str], str], code: Callable[[str], str]) -> str:
    """A sentence of a table, whose commands stand between backticks."""
    parts = words.split("`")
    if len(parts) % 2 == 0:  # one too many: it is of a name
        return escape(words)
    return "".join(code(part) if place % 2 else escape(part) for place, part in enumerate(parts))


def _markdown(words: str) -> str:
    return _words(words, _in_sentence, escaping.code)


def _in_sentence(part: str) -> str:
    """A part of a sentence, with the spaces at its ends."""
    before, after = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :] if part.strip() else ""
    return before + escaping.markdown(part) + after


def _latex(words: str) -> str:
    return re.sub(r"\\textasciigrave\{\}(.*?)\\textasciigrave\{\}", r"\\texttt{\1}", escaping.latex(words))
