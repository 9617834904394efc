"""`python -m bench digest`: a run in a few lines of Markdown, for a comment under a pull request."""

import argparse
from collections.abc import Sequence

from bench.commands.arguments import journal_option
from bench.errors import JournalError
from bench.report.pull_request import digest
from bench.results.bases import told_apart
from bench.results.journal import read


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a run of a journal in a few lines of Markdown: `python -m bench digest`."""
    parser = argparse.ArgumentParser(prog="python -m bench digest", description=main.__doc__.split(":")[0])
    journal_option(parser)
    parser.add_argument("--run", help="id of the run; default the last one")
    options = parser.parse_args(arguments)
    try:
        print(digest(told_apart(read(options.journal)), options.run), end="")
    except JournalError as error:
        parser.error(str(error))
