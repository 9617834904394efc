"""How much this machine's timings scatter, and what the gate can see on it: the same measurement over and over (A/A).

Each rerun has a compressed model, decoders and caches of its own and takes rounds of base and compressed model in turn
for `--seconds` at most, and five in any case. It is judged against the one before it as a run is against its baseline,
by the real gate: with the usual rounds, then with more (`gate.MORE`) where it would ask for them, as far as they were
taken. Nothing has changed, so every alarm is a false one.

All metrics of a generation share their rounds: their alarms are not independent, and a rerun is not a run of
`--rows` rows; its rows are judged at the level that they would have in one.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import gate
from bench._baseline import Entry, Section
from bench._errors import BenchError, OptionError
from bench._shift import SAMPLES, quantile, shift
from bench.metrics import Metric, metrics_of
from bench.rows import Row

FOUND = 0.95  # share of runs in which a change of the reported size is found


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


def noise(reruns: Sequence[Rerun], metrics: Sequence[Metric], *, runs: int, rows: int) -> list[Noise]:
    """What neighbouring reruns tell of each metric. Raises OptionError for fewer than three."""
    if len(reruns) < 3:
        raise OptionError(f"{len(reruns)} reruns tell nothing of noise: at least 3, better 20")
    level = gate.LEVEL / 2 / rows
    pairs = list(zip(reruns[1:], reruns, strict=False))
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
        f"{alarms} false alarms in {judgements} rows ({found[0].pairs} reruns, each against the one before), judged "
        f"as rows of a run of {rows}. `visible` is the slowdown that is found in {100 * FOUND:.0f} % of such runs "
        "with the present tolerance and the rounds taken here; the proposed tolerance is what reruns differ by beyond "
        "what their rounds tell. Other days and other neighbours on the machine can differ by more.",
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
    add("--seconds", type=float, default=10.0, help="of one rerun, at most; default 10")
    add("--rows", type=int, default=100, help="of the run that the gate's level is for; default 100")
    add("--runs", type=int, default=10, help="rounds at the first look; default 10")
    add("--prompt-tokens", type=int, default=16)
    add("--max-new-tokens", type=int, default=16)
    add("--journal", type=Path, default=Path(".bench/calibration.jsonl"))
    given = parser.parse_args(arguments)
    for name, least in (("reruns", 3), ("rows", 1), ("runs", SAMPLES)):
        if getattr(given, name) < least:
            parser.error(f"--{name} {getattr(given, name)} is not allowed: at least {least}")
    try:
        print(report(noise(_taken(given), timed(), runs=given.runs, rows=given.rows), rows=given.rows))
    except BenchError as error:
        raise SystemExit(f"python -m bench calibrate-gate: {error}") from None


def _taken(given: argparse.Namespace) -> list[Rerun]:
    import torch

    import compression
    from bench import machine
    from bench.generation import Load

    facts = {
        "base": given.base,
        "model": compression.Recipe.parse(given.model).text,
        "fingerprint": machine.fingerprint(given.device),
        "torch": torch.__version__,
        "prompt_tokens": given.prompt_tokens,
        "new_tokens": given.max_new_tokens,
    }
    reruns = kept(given.journal, facts)
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
            append({"kind": "rerun", "at": round(begun), "seconds": round(took, 2), "own": one.own, "base": one.base})
            reruns.append(one)
    return reruns
