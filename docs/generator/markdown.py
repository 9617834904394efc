"""Markdown that every page of the reference is made of."""

import re
from collections.abc import Iterable, Sequence

MADE = "<!-- made by `python docs/generate.py`; edit the code, not this page -->"


def page(title: str, *parts: str) -> str:
    """A page: its title, the mark that it is generated, its parts."""
    return joined([f"# {title}", MADE, *(part.strip("\n") for part in parts)]) + "\n"


def joined(parts: Iterable[str]) -> str:
    """Paragraphs, without the empty ones."""
    return "\n\n".join(filter(None, parts))


def plain(text: str) -> str:
    """Text without marks of its own: what would be an HTML tag or emphasis is escaped, code stays as it is.

    >>> plain("random:<shape> of `a*b` or *.jsonl")
    'random:&lt;shape> of `a*b` or \\\\*.jsonl'
    """
    parts = text.split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;").replace("*", "\\*") for i, part in enumerate(parts))


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with every cell on one line."""
    lines = [heading, [":---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell(each) for each in line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text for one cell: no line break, and no bar that would end the cell.

    >>> cell("a | b\\nc")
    'a \\\\| b c'
    """
    return " ".join(text.split()).replace("|", "\\|")


def prose(docstring: str | None) -> str:
    """A docstring (with its indentation taken away) as Markdown.

    Sections such as `Args:` become bold words with a list, examples become code blocks.
    """
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", (docstring or "").strip("\n")):
        lines = block.splitlines()
        if any(line.lstrip().startswith(">>>") for line in lines):
            blocks.append("```pycon\n" + "\n".join(line.strip() for line in lines) + "\n```")
        elif lines and (found := re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", lines[0].strip())):
            blocks.append(f"**{found[1]}**\n\n" + "\n".join(_entries(lines[1:])))
        elif lines and all(line.startswith("    ") for line in lines):
            blocks.append("```text\n" + "\n".join(line[4:] for line in lines) + "\n```")
        else:
            blocks.append(plain("\n".join(lines)))
    return joined(blocks)


def _entries(lines: Sequence[str]) -> list[str]:
    """Indented `name: meaning` lines as a list; deeper lines continue the entry above."""
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    found: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) > indent and found:
            found[-1] += f" {plain(line.strip())}"
        else:
            name, colon, meaning = plain(line.strip()).partition(": ")
            found.append(
                f"- `{name}`: {meaning}" if colon and re.fullmatch(r"[\w., *]+", name) else f"- {plain(line.strip())}"
            )
    return found
