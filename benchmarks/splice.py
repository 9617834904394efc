"""Copy measured tables into the pages that show them: whole tables, with the command that made them.

    python benchmarks/splice.py                  # README and every page of docs/, bench/ and benchmarks/
    python benchmarks/splice.py --check          # change nothing; status 1 where a page is out of date
    python benchmarks/splice.py README.md        # one page

A table stands between `<!-- table: FILE: HEADING -->`, which names the source file from the repository's root and the
heading above the table in it, and `<!-- end of table -->`. Where the source says "Measured by `COMMAND`." or "Made by
`COMMAND`." below that heading, the same sentence is written under the table.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "bench", "benchmarks")
_PLACE = re.compile(
    r"(?P<begin><!-- table: (?P<file>[^:]+): (?P<heading>.+?) -->\n)(?P<body>.*?)(?P<end><!-- end of table -->)",
    re.DOTALL,
)
_COMMAND = re.compile(r"^(?:- )?((?:Measured|Made) by `[^`]+`\.)$", re.MULTILINE)


class Place(NamedTuple):
    """A table in a page: the source that its marker names, and the text between the markers."""

    file: str
    heading: str
    body: str


def places(text: str) -> Iterator[Place]:
    """The marked tables of a page, in order."""
    for found in _PLACE.finditer(text):
        yield Place(found["file"], found["heading"], found["body"])


def spliced(text: str, root: Path = ROOT) -> str:
    """The page with each marked table as its source has it now.

    Raises ValueError for a heading or table that the source lacks, OSError for a source that cannot be read.
    """
    return _PLACE.sub(
        lambda found: f"{found['begin']}{table(root / found['file'], found['heading'])}\n{found['end']}", text
    )


def table(path: Path, heading: str) -> str:
    """The first table below a heading of a Markdown file, up to the next heading, and the command that made it."""
    section = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    if section is None:
        raise ValueError(f"{path} has no heading {heading!r}")
    found = re.search(r"(?:^\|.*\n?)+", section[1], re.MULTILINE)
    if found is None:
        raise ValueError(f"{path}: there is no table below {heading!r}")
    command = _COMMAND.search(section[1])
    return "\n\n".join([found[0].rstrip("\n"), *([command[1]] if command else [])])


def pages(root: Path = ROOT) -> list[Path]:
    """The Markdown files that can have marked tables: those at the root and in FOLDERS."""
    return sorted([*root.glob("*.md"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.md"))])


def main() -> None:
    """Splice the named files, or all pages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: README and all pages")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where a page is out of date")
    given = parser.parse_args()
    outdated = []
    for path in given.files or pages():
        try:
            text = path.read_text(encoding="utf-8")
            new = spliced(text)
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
        if new != text:
            outdated.append(path)
            if not given.check:
                path.write_text(new, encoding="utf-8")
    for path in outdated:
        print(f"{path}: {'out of date; run python benchmarks/splice.py' if given.check else 'written'}")
    sys.exit(bool(outdated) and given.check)


if __name__ == "__main__":
    main()
