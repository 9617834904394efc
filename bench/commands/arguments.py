"""Arguments that several commands share."""

import argparse
from pathlib import Path

from bench.results.journal import JOURNAL
from compression.files.strict_json import path_option


def journal_option(parser: argparse.ArgumentParser, default: Path | None = JOURNAL) -> None:
    """`--journal FILE`; without it `default`, which is None where a command must know whether one was named."""
    parser.add_argument("--journal", type=path_option, default=default, metavar="FILE", help=f"default ./{JOURNAL}")


def sources(parser: argparse.ArgumentParser) -> None:
    """The options that say whose results are meant."""
    journal_option(parser, default=None)
    parser.add_argument(
        "--baselines", type=path_option, metavar="DIR", help="use recorded baselines instead of a journal"
    )
    parser.add_argument("--base", help="default that of the last results")
    parser.add_argument("--device", help="fingerprint of the device; default the device of the last results")
