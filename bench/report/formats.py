"""A table as Markdown, LaTeX, HTML or plain text, out of one declaration. The best values of a column are marked."""

import html as markup
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from bench.report._cells import Cell
from bench.report.tables import NOT_MEASURED, Line, Table

if TYPE_CHECKING:
    import pandas as pd

_LATEX = {"\\": r"\textbackslash{}", "→": r"$\rightarrow$", "±": r"$\pm$", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}"} | {sign: "\\" + sign for sign in "&%$#_{}"}  # fmt: skip


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


def text(table: Table) -> str:
    """For a terminal: what was measured, the best marked with `*`, and the findings."""
    body = _frame(table, str, lambda cell: cell.text + "*" * cell.best).rename_axis(None)
    measured = body.ne(NOT_MEASURED)
    body = body.loc[measured.any(axis=1), measured.any(axis=0)]
    return "\n".join([title(table), body.to_string(), *table.findings])


def markdown(table: Table) -> str:
    """A heading, the table with the best in bold, its notes, and the command that measures it."""

    def cell(each: Cell) -> str:
        shown = _flat(each.text)
        return (f"**{shown}**" if each.best else shown) + (f" ({each.note})" if each.note else "")

    body = _frame(table, _flat, cell).to_markdown(disable_numparse=True)
    notes = [f"({place}) {_flat(note)}" for place, note in enumerate(table.notes, 1)]
    below = [*table.findings, *notes, *table.remarks, *(_reported(line, table.columns) for line in table.elsewhere)]
    lines = "".join(f"- {each}\n" for each in below + ([f"Measured by `{table.command}`."] if table.command else []))
    return f"### {title(table)}\n\n{body}\n\n{lines}"


def latex(table: Table) -> str:
    """A `table` with booktabs and `\\resizebox` (graphicx), the best in bold."""

    def cell(each: Cell) -> str:
        shown = _escaped(each.text)
        return (rf"\textbf{{{shown}}}" if each.best else shown) + (f"$^{{{each.note}}}$" if each.note else "")

    body = _frame(table, _escaped, cell).reset_index().to_latex(
        index=False, escape=False, column_format="l" + "r" * len(table.columns))  # fmt: skip
    notes = [f"$^{{{place}}}$ {_escaped(note)}" for place, note in enumerate(table.notes, 1)]
    below = [*map(_escaped, table.findings), *notes, *map(_escaped, table.remarks),
             *(_escaped(_reported(line, table.columns)) for line in table.elsewhere)]  # fmt: skip
    return "\n".join([
        r"\begin{table}[htbp]", r"\centering", rf"\caption{{{_escaped(title(table))}}}", rf"\label{{tab:{table.name}}}",
        r"\resizebox{\linewidth}{!}{%", body.rstrip() + "}", *(rf"\par\footnotesize {each}" for each in below),
        r"\end{table}", "",
    ])  # fmt: skip


def html(table: Table) -> str:
    """A `figure` with the table, whose cells carry their number in `data-value`, and the notes below it."""

    def cell(each: Cell) -> str:
        shown = markup.escape(each.text)
        value = "" if each.value is None else f' data-value="{each.value!r}"'
        note = f"<sup>{each.note}</sup>" if each.note else ""
        return f"<td{value}>{f'<strong>{shown}</strong>' if each.best else shown}{note}</td>"

    heads = "".join(f'<th scope="col">{markup.escape(head)}</th>' for head in ("Method", *table.columns))
    body = "".join(
        f'<tr><th scope="row">{markup.escape(line.name)}</th>{"".join(map(cell, line.cells))}</tr>\n'
        for line in table.lines
    )
    below = [*table.findings, *table.remarks, *(_reported(line, table.columns) for line in table.elsewhere),
             *([f"Measured by {table.command}"] if table.command else [])]  # fmt: skip
    return (
        f'<figure id="{table.name}">\n<table>\n<caption>{markup.escape(title(table))}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n<figcaption>\n"
        + (f"<ol>{''.join(f'<li>{markup.escape(note)}</li>' for note in table.notes)}</ol>\n" if table.notes else "")
        + "".join(f"<p>{markup.escape(each)}</p>\n" for each in below)
        + "</figcaption>\n</figure>\n"
    )


def _flat(words: str) -> str:
    """Text that ends no line and no cell of Markdown."""
    return " ".join(words.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _escaped(words: str) -> str:
    """Text as LaTeX shows it: commands in typewriter, hyphens as they are."""
    escaped = "".join(_LATEX.get(letter, letter) for letter in " ".join(words.split())).replace("--", "-{}-")
    return re.sub(r"`([^`]*)`", r"\\texttt{\1}", escaped)
