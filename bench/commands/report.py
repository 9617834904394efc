"""`python -m bench report`: the report of a journal as files, or its tables as Markdown."""

import argparse
from collections.abc import Sequence

from bench.commands.arguments import sources
from bench.errors import BaselineError, JournalError, OptionError
from bench.report import formats
from bench.report.commands_to_type import settings_in
from bench.report.tables import tables
from bench.report.write import chosen_of_baselines, of_journal, one_of, write
from bench.results.journal import JOURNAL, read
from bench.results.records import Contents
from bench.results.row import Row
from compression import CompressionError
from compression.files.strict_json import path_option


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a journal into a folder, or print its tables as Markdown: `python -m bench report`."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=main.__doc__.split(":")[0])
    sources(parser)
    parser.add_argument(
        "--out", type=path_option, metavar="DIR", help="folder of the report; without it the tables are printed"
    )
    parser.add_argument("--tables", metavar="NUMBERS", help="print these tables only, such as E14,O1,S4")
    options = parser.parse_args(arguments)
    try:
        written = None if options.baselines else read(options.journal or JOURNAL)
        rows, contents = _results(options, written)
        if options.out:
            print("\n".join(map(str, write(options.out, rows, contents))))
        else:
            made = tables(rows, settings_in(written, rows[-1]))  # for whoever measured: with paths
            print("\n".join(map(formats.markdown, one_of(made, options.tables) if options.tables else made)))
    except (BaselineError, CompressionError, JournalError, OptionError) as error:
        parser.error(str(error))


def _results(options: argparse.Namespace, written: Contents | None) -> tuple[list[Row], Contents | None]:
    if written is None:
        return chosen_of_baselines(options.baselines, options.base, options.device), None
    return of_journal(written, str(options.journal or JOURNAL), options.base, options.device)
