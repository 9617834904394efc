"""`python -m bench sign`: accept baselines that were edited by hand."""

import argparse
from collections.abc import Sequence

from bench.errors import BaselineError
from bench.gate.digest import sign
from compression.files.strict_json import path_option


def main(arguments: Sequence[str] | None = None) -> None:
    """Accept baselines that were edited by hand: write the digest of what they say now."""
    parser = argparse.ArgumentParser(prog="python -m bench sign", description=main.__doc__)
    parser.add_argument(
        "files",
        nargs="+",
        type=path_option,
        metavar="FILE",
        help="baselines/<base>/<recipe>.json, baselines/tolerances.json",
    )
    options = parser.parse_args(arguments)
    try:
        for path in options.files:
            print(sign(path) or f"{path}: nothing was changed")
    except BaselineError as error:
        parser.error(str(error))
