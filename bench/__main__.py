"""`python -m bench COMMAND ...`: what is done with results after they were measured. Measuring is `pytest bench`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

from compression.files.terminal import Lines, reader_may_leave

COMMANDS = {  # name: the module whose `main(arguments)` it is, and what it does
    "summary": ("bench.commands.summary", "print the last run of a journal as a Markdown table"),
    "report": ("bench.commands.report", "write the report of a journal, or print the tables of the papers"),
    "recommend": ("bench.commands.recommend", "name the methods within limits of size, quality and speed"),
    "digest": ("bench.commands.digest", "print the last run in a few lines of Markdown"),
    "baselines": ("bench.commands.baselines", "list, compare, record, merge, prune and migrate baselines"),
    "history": ("bench.commands.history", "name the commits at which metrics moved over the stored runs"),
    "calibrate-gate": (
        "bench.commands.calibrate_gate",
        "measure how much timings scatter here, and what the gate can see",
    ),
    "mend": ("bench.commands.repair", "move damaged lines of a journal aside and keep the rest"),
    "sign": ("bench.commands.sign", "accept baselines that were edited by hand"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; its own `--help` tells its options."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__.split(": ", 1)[1],
        epilog="\n".join(["commands:", *(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given[:1])
    module, _ = COMMANDS[options.command]
    with redirect_stdout(Lines(sys.stdout)), redirect_stderr(Lines(sys.stderr)):  # names are from outside
        importlib.import_module(module).main(given[1:])


if __name__ == "__main__":
    with reader_may_leave():
        main()
