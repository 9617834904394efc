"""Run the commands whose output README shows, and write the output below them.

    python docs/outputs.py             # README.md
    python docs/outputs.py FILE ...    # other pages

An output stands between `<!-- output: COMMAND -->`, a command for the root of a clone, and `<!-- end of output -->`.
"""

import argparse
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
_PLACE = re.compile(r"(<!-- output: (?P<command>.+?) -->\n)(?P<shown>.*?)(<!-- end of output -->)", re.DOTALL)


class Place(NamedTuple):
    """A command in a page, and what the page shows of it: the command and its output."""

    command: str
    shown: str


def places(text: str) -> Iterator[Place]:
    """The outputs of a page, in order."""
    for found in _PLACE.finditer(text):
        yield Place(found["command"], found["shown"])


def with_outputs(text: str, run: Callable[[str], str]) -> str:
    """The page with what `run` says of each command.

    >>> print(with_outputs("<!-- output: ls -->\\n<!-- end of output -->", lambda command: "a.txt"))
    <!-- output: ls -->
    ```console
    $ ls
    a.txt
    ```
    <!-- end of output -->
    """
    return _PLACE.sub(lambda found: f"{found[1]}{shown(found['command'], run(found['command']))}\n{found[4]}", text)


def shown(command: str, output: str) -> str:
    """A command and its output as a page shows them."""
    return f"```console\n$ {command}\n{output}\n```"


def output_of(command: str) -> str:
    """What a command prints, with paths in the clone as seen from its root; CalledProcessError where it fails."""
    environment = os.environ | {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return "\n".join(line.rstrip() for line in done.stdout.replace(f"{ROOT}/", "").strip("\n").splitlines())


def main() -> None:
    """Write the outputs of README, or of the pages that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / "README.md"], metavar="FILE")
    for path in parser.parse_args().files:
        path.write_text(with_outputs(path.read_text(encoding="utf-8"), output_of), encoding="utf-8")


if __name__ == "__main__":
    main()
