"""`python -m bench recommend`: the methods within limits of size, quality and speed."""

import argparse
from collections.abc import Sequence

from bench.commands.arguments import sources
from bench.errors import BaselineError, JournalError, OptionError
from bench.measure.engines.environments import ENGINES
from bench.report.cells import by_ratio
from bench.report.escaping import printable
from bench.report.recommend import (
    BASELINES,
    COSTS,
    QUALITY,
    Answer,
    Limits,
    choice_of,
    lines,
    on_runtime,
    points_of,
    recommend,
    share,
)
from bench.report.write import chosen_of_baselines, measured
from bench.results.journal import JOURNAL
from bench.results.row import Row
from compression.recipes.recipe import UNCOMPRESSED


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"it must be a number above 0, not {text!r}")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Name the methods on the front that stay within limits, from results that were measured: `python -m bench
    recommend`."""
    parser = argparse.ArgumentParser(prog="python -m bench recommend", description=__doc__.split("\n")[0])
    sources(parser)
    parser.add_argument("--max-gb", type=_positive, metavar="GIB", help="maximum stored size, in GiB as in the papers")
    parser.add_argument(
        "--max-quality-loss", type=share, metavar="SHARE", help="maximum loss of the base's quality, such as 2%%"
    )
    parser.add_argument(
        "--max-latency", type=_positive, metavar="MS", help="maximum latency per generated token, at batch size 1"
    )
    parser.add_argument("--quality", choices=QUALITY, help="quality metric; default the one that more methods have")
    parser.add_argument("--runtime", choices=list(ENGINES), help="recommend what this engine served, by its figures; "
                        "default what runs in this package")  # fmt: skip
    prefer = parser.add_mutually_exclusive_group()
    prefer.add_argument(
        "--fastest", action="store_const", dest="prefer", const="latency", help="the fastest method only"
    )
    prefer.add_argument(
        "--smallest", action="store_const", dest="prefer", const="size", help="the smallest method only"
    )
    options = parser.parse_args(arguments)
    limits = Limits(size=options.max_gb, loss=options.max_quality_loss, latency=options.max_latency)
    try:
        rows, source = _results(options)
        rows = on_runtime(rows, options.runtime) if options.runtime else rows
    except (BaselineError, JournalError, OptionError) as error:
        parser.error(str(error))
    found = {name: points_of(rows, name) for name in QUALITY}
    quality = options.quality or max(QUALITY, key=lambda name: len(found[name][0]))
    points, left = found[quality]
    answer = recommend(points, limits, options.prefer or "loss")
    if options.prefer and answer.taken:
        answer = Answer(taken=answer.taken[:1], nearest=None, front=answer.front, considered=answer.considered)
    on = f"{options.runtime} on " if options.runtime else ""
    print(printable(f"{rows[0].base}, from {source}; timings and memory are those of {on}{rows[0].device}."))
    if words := by_ratio({column: choice_of(column, rows) for column in COSTS}):
        print(words)
    print("\n".join(lines(answer, limits, quality)))
    unknown = [point.recipe for point in points if point.latency is None]
    if unknown and (options.prefer == "latency" or limits.latency is not None):
        print(f"\nNot considered because their latency has no ratio to {UNCOMPRESSED}: {', '.join(unknown)}")
    if left:
        print(
            f"\nNot considered because size or {quality} was not measured under the same conditions: {', '.join(left)}"
        )


def _results(options: argparse.Namespace) -> tuple[list[Row], str]:
    """A journal if one is named or there, else the baselines."""
    if options.baselines is None and (options.journal or JOURNAL.exists()):
        path = options.journal or JOURNAL
        return measured(path, options.base, options.device)[0], str(path)
    directory = options.baselines or BASELINES
    return chosen_of_baselines(directory, options.base, options.device), f"the baselines in {directory}"
