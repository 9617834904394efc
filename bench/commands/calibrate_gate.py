"""Calibrates the gate: how much timings scatter on this machine, by repeating one measurement (A/A).

Each rerun has copies of both models, decoders and caches of its own and takes rounds of base and compressed in turn
for `--seconds` at most, and five in any case. `--processes` share the reruns, one after the other, so that what a
process keeps for as long as it lives (where its memory lies) varies as between a run and its baseline.

A rerun is judged against the one before it, and against the one half the series away, in another process, as a run is
against its baseline, by the real gate: with the usual rounds, then with more (`gate.MORE`) where it would ask for them,
as far as they were taken. Nothing has changed, so every alarm is a false one. What pairs differ by beyond what their
rounds tell is the tolerance that is proposed; `--write` records it for this device (`bench.gate.tolerances`). Reruns of
another hour, with the same journal and more `--reruns`, are added to those that are there.

How often a slowdown is found is counted on the same rounds: the pairs are judged again with the times of the compressed
model, or of one copy, longer by 5 and 10 %. `median:5%` are the alarms that pytest-benchmark's
`--benchmark-compare-fail` would have raised: the median of a rerun's usual rounds beside that of the one before.

With `--beside` the second model is another copy of the compressed one, and each rerun is judged by itself, as
`--against` judges this code beside that of a commit: 1 % is what differs, where nothing does.

All metrics of a generation share their rounds: their alarms are not independent, and a rerun is not a run of
`--rows` rows; its rows are judged at the level that they would have in one.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.commands.reruns import Rerun, taken, timed
from bench.errors import BenchError, OptionError
from bench.gate import tolerances, verdicts
from bench.gate.baseline import Section
from bench.gate.entry import Entry
from bench.machine import device as machine
from bench.machine import git as repository
from bench.metrics import Metric, all_metrics
from bench.results.bases import DEFAULT_BASE
from bench.statistics.timing_change import SAMPLES, quantile, shift
from compression.files.strict_json import at_least, path_option

SLOWER = (0.05, 0.10)  # slowdowns that are looked for
PEER = 0.05  # of pytest-benchmark's comparison
FOUND = 0.95  # share of runs in which a change of the reported size is found
FEWEST = 20  # reruns whose tolerances may be recorded


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What the reruns tell of one metric; all shares."""

    metric: Metric
    pairs: int
    scatter: float  # standard deviation of a difference between neighbours, beyond the middle one
    believed: float  # what their rounds make of it: the middle standard error
    largest: float
    outcomes: dict[str, int]
    found: tuple[int, ...]  # in how many pairs each of SLOWER is
    peer: int  # alarms of pytest-benchmark's rule, of one rerun fewer
    visible: float  # found in FOUND of runs with the present tolerance
    proposed: float  # tolerance

    @property
    def alarms(self) -> int:
        return self.outcomes.get("regressed", 0) + self.outcomes.get("improved", 0)


def judged(now: Rerun, then: Rerun, metrics: Sequence[Metric], runs: int, level: float, device: str) -> dict[str, str]:
    """What the gate says of each metric of one rerun against another, more rounds asked for as a run does."""
    context = {"base_hash": "-", "data_hash": None, "seed": 0, "torch": "-"}
    taken = len(next(iter(now.own.values())))
    entries = {}
    for metric in metrics:
        row = then.row(metric, taken, device)
        entries[row.key] = Entry.of_row(row, metric, context, device)
    baseline = verdicts.Baseline(
        base="-", recipe="-", sections={device: Section(context=context | {"fingerprint": device}, rows=entries)}
    )
    before: list[verdicts.Verdict] = []
    found: list[verdicts.Verdict] = []
    for times in (1, *verdicts.MORE):
        common = {"fingerprint": device, "context": context, "metrics": {metric.name: metric for metric in metrics}}
        before, found = (
            found,
            [
                verdicts.judge_beside(row, level=level, mode="strict", **common)
                if row.of == verdicts.AGAINST
                else verdicts.judge(
                    row, baseline, mode="strict", shares=verdicts.Levels(timed=level, items=level), **common
                )
                for row in (now.row(metric, times * runs, device) for metric in metrics)
            ],
        )
        if verdicts.enough_rounds(found, before) or times * runs >= taken:
            break
    return {metric.name: verdict.outcome for metric, verdict in zip(metrics, found, strict=True)}


def paired(reruns: Sequence[Rerun]) -> list[tuple[Rerun, Rerun]]:
    """A later and an earlier rerun: each with the one before, and with the one half the series before."""
    half = len(reruns) // 2
    return [(reruns[i], reruns[i - apart]) for apart in sorted({1, half}) for i in range(apart, len(reruns))]


def _sides(now: Rerun, then: Rerun, metric: Metric) -> tuple[tuple[list[float], ...], tuple[list[float], ...]]:
    """What is compared: ratios to the base with each other, or the two copies of one rerun."""
    if metric.of == verdicts.AGAINST:
        return (now.own[metric.name], now.base[metric.name]), ()
    return (now.own[metric.name], now.base[metric.name]), (then.own[metric.name], then.base[metric.name])


def slowed(rerun: Rerun, metrics: Sequence[Metric], by: float) -> Rerun:
    """A rerun whose compressed model takes longer by that share."""
    times = {each.name: 1 / (1 + by) if each.better == "higher" else 1 + by for each in metrics}
    return Rerun(own={name: [times[name] * each for each in rerun.own[name]] for name in times}, base=rerun.base)


def noise(reruns: Sequence[Rerun], metrics: Sequence[Metric], *, runs: int, rows: int) -> list[Noise]:
    """What pairs of reruns tell of each metric. Raises OptionError for fewer than three."""
    if len(reruns) < 3:
        raise OptionError(f"calibration needs at least 3 reruns, better {FEWEST}, not {len(reruns)}")
    level = verdicts.LEVEL / 2 / rows
    beside = any(metric.of == verdicts.AGAINST for metric in metrics)
    pairs = [(each, each) for each in reruns] if beside else paired(reruns)
    outcomes = [judged(now, then, metrics, runs, level, "here") for now, then in pairs]
    later = [
        [judged(slowed(now, metrics, by), then, metrics, runs, level, "here") for now, then in pairs] for by in SLOWER
    ]
    found = []
    for metric in metrics:
        shifts = [
            moved
            for now, then in pairs
            if (moved := shift(
                *_sides(now, then, metric), metric.best, highest=metric.better == "higher",
            ))
        ]  # fmt: skip
        if not shifts:
            raise OptionError(f"{metric.name}: no rerun has {SAMPLES} rounds; raise --seconds")
        logs = [each.log for each in shifts]
        scatter = math.sqrt(statistics.fmean(each**2 for each in logs))
        believed = statistics.median(each.error for each in shifts)
        tail = verdicts.one_sided(level, len(verdicts.checks_of(metric, ratio=not beside)))
        reach = quantile(tail, round(statistics.median(each.freedom for each in shifts)))
        between = math.sqrt(max(0.0, scatter**2 - statistics.fmean(each.error**2 for each in shifts)))
        beyond = max(abs(each.log) - reach * each.error for each in shifts)
        found.append(
            Noise(
                metric=metric,
                pairs=len(pairs),
                scatter=scatter,
                believed=believed,
                largest=max(map(abs, logs)),
                outcomes={
                    name: sum(each[metric.name] == name for each in outcomes)
                    for name in ("pass", "inconclusive", "regressed", "improved")
                },
                found=tuple(sum(each[metric.name] == "regressed" for each in found_of) for found_of in later),
                peer=_peer([statistics.median(each.own[metric.name][:runs]) for each in reruns], metric),
                visible=math.expm1(
                    math.log1p(metric.rel) + reach * believed + statistics.NormalDist().inv_cdf(FOUND) * scatter
                ),
                proposed=math.ceil(1000 * max(0.01, 3 * between, 1.5 * beyond)) / 1000,
            )
        )
    return found


def _peer(medians: Sequence[float], metric: Metric) -> int:
    if metric.better == "higher":
        medians = [1 / each for each in medians]
    return sum(now > (1 + PEER) * then for then, now in itertools.pairwise(medians))


def report(found: Iterable[Noise], *, rows: int) -> str:
    """The table as Markdown, and what follows from it in words."""
    found = list(found)
    head = (
        "metric", "scatter", "from the rounds", "largest", "pass", "inconclusive", "alarms",
        *(f"{100 * by:g} % found" for by in SLOWER), f"median:{100 * PEER:g}%", "tolerance", "visible",
        "proposed tolerance",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|:---|{'---:|' * (len(head) - 1)}"]
    for each in found:
        shares = [each.scatter, each.believed, each.largest]
        counts = [each.outcomes["pass"], each.outcomes["inconclusive"], each.alarms, *each.found, each.peer]
        cells = [
            each.metric.name,
            *(f"{100 * share:.2f} %" for share in shares),
            *map(str, counts),
            *(f"{100 * share:.3g} %" for share in (each.metric.rel, each.visible, each.proposed)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    alarms, judgements = sum(each.alarms for each in found), sum(each.pairs for each in found)
    beside = any(each.metric.of == verdicts.AGAINST for each in found)
    compared = f"{found[0].pairs} " + (
        "reruns, the two copies of each" if beside else "pairs of reruns, neighbours and half the series apart"
    )
    lines += [
        "",
        f"{alarms} false alarms in {judgements} rows ({compared}), judged as rows of a run of {rows}. "
        f"`visible` is the slowdown that is found in {100 * FOUND:.0f} % of "
        "such runs with the present tolerance and the rounds taken here; the proposed tolerance is what reruns differ "
        "by beyond what their rounds tell. Other days and other neighbours on the machine can differ by more.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Complete the journal to `--reruns`, then print what it tells."""
    parser = argparse.ArgumentParser(prog="python -m bench calibrate-gate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--base", default=DEFAULT_BASE, help=f"base; default {DEFAULT_BASE}")
    add("--model", default="nf4", help="recipe; default nf4")
    add("--device", default="cpu")
    add(
        "--reruns",
        type=int,
        default=20,
        help="number of reruns in all; default 20. Those in the journal are not repeated",
    )
    add("--processes", type=int, default=4, help="processes that share the reruns, one after the other; default 4")
    add("--seconds", type=float, default=10.0, help="maximum seconds per rerun; default 10")
    add("--rows", type=int, default=100, help="rows of the run that the gate's error level is for; default 100")
    add("--runs", type=int, default=10, help="rounds of the first test; default 10")
    add("--prompt-tokens", type=int, default=16)
    add("--max-new-tokens", type=int, default=16)
    add("--journal", type=path_option, default=Path(".bench/calibration.jsonl"))
    add("--beside", action="store_true", help="compare two copies of the compressed model, as --against does")
    add("--write", action="store_true", help="record the proposed tolerances, which the gate then uses on this device")
    add(
        "--baselines",
        type=path_option,
        default=Path("baselines"),
        metavar="DIR",
        help="folder of the recorded tolerances",
    )
    given = parser.parse_args(arguments)
    for name, least in (("reruns", FEWEST if given.write else 3), ("rows", 1), ("runs", SAMPLES), ("processes", 1)):
        at_least(f"--{name}", getattr(given, name), least, parser.error)
    if given.write and given.beside:
        parser.error("--write needs tolerances, and --beside proposes none: leave one of the two out")
    try:
        facts = _facts(given)
        device = facts["fingerprint"]
        own = {each.name for each in timed(given.beside)}
        metrics = [
            each for each in tolerances.held(all_metrics(), given.baselines, device).values() if each.name in own
        ]
        reruns = taken(given, facts)
        found = noise(reruns, metrics, runs=given.runs, rows=given.rows)
        print(report(found, rows=given.rows))
        if given.write:
            context = facts | {"reruns": len(reruns), "commit": repository.commit(given.baselines)}
            path = tolerances.record(
                given.baselines, device, {each.metric.name: each.proposed for each in found}, context
            )
            print(f"recorded in {path}")
    except BenchError as error:
        raise SystemExit(f"python -m bench calibrate-gate: {error}") from None


def _facts(given: argparse.Namespace) -> dict[str, Any]:
    """What all reruns of a journal share."""
    import torch

    import compression

    return {
        "base": given.base,
        "model": compression.Recipe.parse(given.model).text,
        "fingerprint": machine.fingerprint(given.device),
        "torch": torch.__version__,
        "prompt_tokens": given.prompt_tokens,
        "new_tokens": given.max_new_tokens,
    } | ({"beside": True} if given.beside else {})
