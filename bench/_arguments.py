"""What several commands take: the journal that they read."""

import argparse
from pathlib import Path

from bench.journal import JOURNAL


def journal_option(parser: argparse.ArgumentParser, default: Path | None = JOURNAL) -> None:
    """`--journal FILE`; without it `default`, which is None where a command must know whether one was named."""
    parser.add_argument("--journal", type=Path, default=default, metavar="FILE", help=f"default ./{JOURNAL}")
