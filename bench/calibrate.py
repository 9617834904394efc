"""How much this machine's timings scatter, and what the gate can see on it: the same measurement over and over (A/A).

Each rerun has a compressed model, decoders and caches of its own and takes rounds of base and compressed model in turn
for `--seconds` at most, and five in any case. `--processes` share the reruns, one after the other: where a process
finds its memory decides over some percent of its times for as long as it lives, and a run and its baseline are two.

A rerun is judged against the one before it, and against the one half the series away, in another process, as a run is
against its baseline, by the real gate: with the usual rounds, then with more (`gate.MORE`) where it would ask for them,
as far as they were taken. Nothing has changed, so every alarm is a false one. What pairs differ by beyond what their
rounds tell is the tolerance that is proposed; `--write` records it for this device (`bench.tolerances`). Reruns of
another hour, with the same journal and more `--reruns`, are added to those that are there.

All metrics of a generation share their rounds: their alarms are not independent, and a rerun is not a run of
`--rows` rows; its rows are judged at the level that they would have in one.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import _repository as repository
from bench import gate, tolerances
from bench._baseline import Entry, Section
from bench._errors import BenchError, OptionError
from bench._shift import SAMPLES, quantile, shift
from bench.metrics import Metric, all_metrics, metrics_of
from bench.rows import Row

FOUND = 0.95  # share of runs in which a change of the reported size is found
FEWEST = 20  # reruns whose tolerances may be recorded


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """One rerun: samples of the compressed model and of the base, in the order taken, by metric."""

    own: dict[str, list[float]]
    base: dict[str, list[float]]

    def row(self, metric: Metric, rounds: int, device: str) -> Row:
        """The row that a run with so many rounds would have had."""
        own, base = (tuple(side[metric.name][:rounds]) for side in (self.own, self.base))
        value, base_value = statistics.median(own), statistics.median(base)
        return Row(
            run="calibration", base="-", recipe="-", device=device, metric=metric.name, unit=metric.unit,
            better=metric.better, params={}, seed=0, of=metric.of, value=value, base_value=base_value,
            ratio=value / base_value, samples=own, base_samples=base,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What the reruns tell of one metric; all shares."""

    metric: Metric
    pairs: int
    scatter: float  # standard deviation of a difference between neighbours, beyond the middle one
    believed: float  # what their rounds make of it: the middle standard error
    largest: float
    outcomes: dict[str, int]
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
    baseline = gate.Baseline(
        base="-", recipe="-", sections={device: Section(context=context | {"fingerprint": device}, rows=entries)}
    )
    before: list[gate.Verdict] = []
    found: list[gate.Verdict] = []
    for times in (1, *gate.MORE):
        before, found = found, [
            gate.judge(
                metric_row, baseline, mode="strict", fingerprint=device, context=context,
                metrics={metric.name: metric}, shares=gate.Levels(timed=level, items=level),
            )
            for metric in metrics
            for metric_row in [now.row(metric, times * runs, device)]
        ]  # fmt: skip
        if gate.decided(found, before) or times * runs >= taken:
            break
    return {metric.name: verdict.outcome for metric, verdict in zip(metrics, found, strict=True)}


def paired(reruns: Sequence[Rerun]) -> list[tuple[Rerun, Rerun]]:
    """A later and an earlier rerun: each with the one before, and with the one half the series before."""
    half = len(reruns) // 2
    return [(reruns[i], reruns[i - apart]) for apart in sorted({1, half}) for i in range(apart, len(reruns))]


def noise(reruns: Sequence[Rerun], metrics: Sequence[Metric], *, runs: int, rows: int) -> list[Noise]:
    """What pairs of reruns tell of each metric. Raises OptionError for fewer than three."""
    if len(reruns) < 3:
        raise OptionError(f"{len(reruns)} reruns tell nothing of noise: at least 3, better {FEWEST}")
    level = gate.LEVEL / 2 / rows
    pairs = paired(reruns)
    outcomes = [judged(now, then, metrics, runs, level, "here") for now, then in pairs]
    found = []
    for metric in metrics:
        shifts = [
            moved
            for now, then in pairs
            if (moved := shift(
                (now.own[metric.name], now.base[metric.name]), (then.own[metric.name], then.base[metric.name]),
                metric.best, highest=metric.better == "higher",
            ))
        ]  # fmt: skip
        if not shifts:
            raise OptionError(f"{metric.name}: no rerun has {SAMPLES} rounds; allow more --seconds")
        logs = [each.log for each in shifts]
        scatter = math.sqrt(statistics.fmean(each**2 for each in logs))
        believed = statistics.median(each.error for each in shifts)
        reach = quantile(level / 2 / gate.LOOKS, round(statistics.median(each.freedom for each in shifts)))
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
                visible=math.expm1(
                    math.log1p(metric.rel) + reach * believed + statistics.NormalDist().inv_cdf(FOUND) * scatter
                ),
                proposed=math.ceil(1000 * max(0.01, 3 * between, 1.5 * beyond)) / 1000,
            )
        )
    return found


def report(found: Iterable[Noise], *, rows: int) -> str:
    """The table as Markdown, and what follows from it in words."""
    found = list(found)
    head = (
        "metric", "scatter", "from the rounds", "largest", "pass", "inconclusive", "alarms", "tolerance",
        "visible", "proposed tolerance",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|:---|{'---:|' * (len(head) - 1)}"]
    for each in found:
        shares = [each.scatter, each.believed, each.largest]
        counts = [each.outcomes["pass"], each.outcomes["inconclusive"], each.alarms]
        cells = [
            each.metric.name,
            *(f"{100 * share:.2f} %" for share in shares),
            *map(str, counts),
            *(f"{100 * share:.3g} %" for share in (each.metric.rel, each.visible, each.proposed)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    alarms, judgements = sum(each.alarms for each in found), sum(each.pairs for each in found)
    lines += [
        "",
        f"{alarms} false alarms in {judgements} rows ({found[0].pairs} pairs of reruns, neighbours and half the series "
        f"apart), judged as rows of a run of {rows}. `visible` is the slowdown that is found in {100 * FOUND:.0f} % of "
        "such runs with the present tolerance and the rounds taken here; the proposed tolerance is what reruns differ "
        "by beyond what their rounds tell. Other days and other neighbours on the machine can differ by more.",
    ]
    return "\n".join(lines)


# --- Measuring --------------------------------------------------------------------------------------------------------


def rerun(base: Any, recipe: Any, load: Any, *, seconds: float, most: int) -> Rerun:
    """Rounds of base and compressed model in turn, both made ready anew, for at most `seconds` and `most` rounds."""
    import compression
    from bench.generation import Decoder, Interleaved
    from bench.metrics.speed import GenerationReading

    begin = time.perf_counter()
    model = compression.compress(base, recipe)
    pair = Interleaved([Decoder(each.model, load) for each in (base, model)])
    pair.run(1 + SAMPLES)  # the first to warm up
    left = seconds - (time.perf_counter() - begin)
    pair.run(1 + most, seconds=0.9 * left)
    sides = [GenerationReading(rounds=tuple(done[1:]), flops=1, peak_flops_per_s=1.0) for done in pair.rounds]
    return Rerun(
        **{
            side: {metric.name: [float(f"{metric(one):.6g}") for one in reading.each()] for metric in timed()}
            for side, reading in zip(("base", "own"), sides, strict=True)
        }
    )


def timed() -> list[Metric]:
    """The metrics of a generation that a device can change, each once: speedup and MFU are others in another unit."""
    skipped = ("efficiency.speedup", "efficiency.mfu")
    return [metric for metric in metrics_of("generation") if metric.per_device and metric.name not in skipped]


def kept(journal: Path, facts: dict[str, Any]) -> list[Rerun]:
    """The reruns in a journal of the same facts; a line that was cut off by a kill is not one.

    Raises BenchError where it has other facts, or is no such journal.
    """
    if not journal.exists():
        return []
    tables = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            tables.append(json.loads(line))
        except ValueError:
            continue
    way_out = "give another --journal, or delete it"
    if not tables or not isinstance(tables[0], dict) or tables[0].get("kind") != "calibration":
        raise BenchError(f"{journal} is no journal of a calibration; {way_out}")
    other = [
        f"{name} was {tables[0].get(name)!r}, is {now!r}" for name, now in facts.items() if tables[0].get(name) != now
    ]
    if other:
        raise BenchError(f"{journal}: {'; '.join(other)}; {way_out}")
    return [Rerun(own=each["own"], base=each["base"]) for each in tables[1:] if each.get("kind") == "rerun"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Complete the journal to `--reruns`, then print what it tells."""
    parser = argparse.ArgumentParser(prog="python -m bench calibrate-gate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--base", default="reference", help="a base; default reference")
    add("--model", default="nf4", help="a recipe; default nf4")
    add("--device", default="cpu")
    add("--reruns", type=int, default=20, help="how many in all; default 20. Those in the journal are not made again")
    add("--processes", type=int, default=4, help="that share the reruns, one after the other; default 4")
    add("--seconds", type=float, default=10.0, help="of one rerun, at most; default 10")
    add("--rows", type=int, default=100, help="of the run that the gate's level is for; default 100")
    add("--runs", type=int, default=10, help="rounds at the first look; default 10")
    add("--prompt-tokens", type=int, default=16)
    add("--max-new-tokens", type=int, default=16)
    add("--journal", type=Path, default=Path(".bench/calibration.jsonl"))
    add("--write", action="store_true", help="record the proposed tolerances, by which the gate then compares here")
    add("--baselines", type=Path, default=Path("baselines"), metavar="DIR", help="where they are recorded")
    given = parser.parse_args(arguments)
    for name, least in (("reruns", FEWEST if given.write else 3), ("rows", 1), ("runs", SAMPLES), ("processes", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name} {getattr(given, name)} is not allowed: at least {least}")
    try:
        facts = _facts(given)
        device = facts["fingerprint"]
        own = {each.name for each in timed()}
        metrics = [
            each for each in tolerances.held(all_metrics(), given.baselines, device).values() if each.name in own
        ]
        reruns = _taken(given, facts)
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
    from bench import machine

    return {
        "base": given.base,
        "model": compression.Recipe.parse(given.model).text,
        "fingerprint": machine.fingerprint(given.device),
        "torch": torch.__version__,
        "prompt_tokens": given.prompt_tokens,
        "new_tokens": given.max_new_tokens,
    }


def _taken(given: argparse.Namespace, facts: dict[str, Any]) -> list[Rerun]:
    """The journal's reruns, completed to as many as are asked for, by processes one after the other."""
    reruns = kept(given.journal, facts)
    missing = given.reruns - len(reruns)
    if missing <= 0 or given.processes == 1:
        return _completed(given, facts, reruns)
    least = 3  # that a process can report of
    for up_to in sorted(
        {max(least, given.reruns - missing * part // given.processes) for part in range(given.processes)}
    ):
        command = [sys.executable, "-m", "bench", "calibrate-gate", "--processes", "1", "--reruns", str(up_to)]
        for name in ("base", "model", "device", "seconds", "runs", "prompt_tokens", "max_new_tokens", "journal"):
            command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise BenchError(f"a process that measures ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return kept(given.journal, facts)


def _completed(given: argparse.Namespace, facts: dict[str, Any], reruns: list[Rerun]) -> list[Rerun]:
    """As `_taken`, in this process."""
    import compression
    from bench.generation import Load

    if len(reruns) >= given.reruns:
        return reruns
    base = compression.open_base(given.base, given.device, dequantize=True)
    recipe = compression.Recipe.parse(given.model)
    load = Load(prompt_tokens=given.prompt_tokens, new_tokens=given.max_new_tokens)
    given.journal.parent.mkdir(parents=True, exist_ok=True)
    most = gate.MORE[-1] * given.runs
    with open(given.journal, "a", encoding="utf-8") as file:

        def append(table: dict[str, Any]) -> None:
            file.write(json.dumps(table) + "\n")
            file.flush()
            os.fsync(file.fileno())

        if not file.tell():
            append({"kind": "calibration", **facts})
        elif not given.journal.read_bytes().endswith(b"\n"):
            file.write("\n")
        while len(reruns) < given.reruns:
            begun = time.time()
            one = rerun(base, recipe, load, seconds=given.seconds, most=most)
            took = time.time() - begun
            append({"kind": "rerun", "at": round(begun), "process": os.getpid(), "seconds": round(took, 2),
                    "own": one.own, "base": one.base})  # fmt: skip
            reruns.append(one)
    return reruns
