"""Write the tables of a Markdown file that come from other files: whole, heading and all rows.

    python benchmarks/splice.py README.md

A table stands between `<!-- table: FILE: HEADING -->`, which names the file, from the repository's root, and the
heading that the table is the first below, and `<!-- end of table -->`.
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PLACE = re.compile(r"(<!-- table: (?P<file>[^:]+): (?P<heading>.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def spliced(text: str, root: Path = ROOT) -> str:
    """The text with each of its tables as the file that it names has it now.

    Raises ValueError for a file, a heading or a table that is not there, OSError for a file that cannot be read.
    """
    return _PLACE.sub(lambda place: f"{place[1]}{table(root / place['file'], place['heading'])}\n{place[4]}", text)


def table(path: Path, heading: str) -> str:
    """The first table below a heading of a Markdown file, up to the next heading."""
    section = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    if section is None:
        raise ValueError(f"{path} has no heading {heading!r}")
    found = re.search(r"(?:^\|.*\n?)+", section[1], re.MULTILINE)
    if found is None:
        raise ValueError(f"{path}: there is no table below {heading!r}")
    return found[0].rstrip("\n")


def main() -> None:
    """Splice the files that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        path.write_text(spliced(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
