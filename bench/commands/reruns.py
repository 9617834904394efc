"""Repeated runs of one measurement in several processes, stored in a journal that `calibrate-gate` reads."""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.gate import verdicts
from bench.machine.environment import child_environment
from bench.measure.generation import Decoder, Interleaved, Load
from bench.metrics import Metric, metrics_of
from bench.metrics.speed import GenerationReading
from bench.results.row import Row
from bench.statistics.timing_change import SAMPLES
from compression.files.strict_json import finite, strict_json


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """One rerun: samples of the compressed model and of the base, or of a copy of it, in the order taken, by metric."""

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


def rerun(base: Any, compressed: Any, load: Any, *, seconds: float, most: int, beside: bool = False) -> Rerun:
    """Rounds of two transformers models in turn, both copied anew, for at most `seconds` and `most` rounds.

    With `beside` a second copy of the compressed one is in the base's place.
    """
    begin = time.perf_counter()
    pair = Interleaved([Decoder(copy.deepcopy(each), load) for each in (compressed if beside else base, compressed)])
    pair.run(1 + SAMPLES)  # the first to warm up
    left = seconds - (time.perf_counter() - begin)
    pair.run(1 + most, seconds=0.9 * left)
    sides = [GenerationReading(rounds=tuple(done[1:]), flops=1, peak_flops_per_s=1.0) for done in pair.rounds]
    return Rerun(
        **{
            side: {metric.name: [float(f"{metric(one):.6g}") for one in reading.each()] for metric in timed(beside)}
            for side, reading in zip(("base", "own"), sides, strict=True)
        }
    )


def timed(beside: bool = False) -> list[Metric]:
    """The metrics of a generation that a device can change, each once: speedup and MFU are others in another unit.

    With `beside` those of two states of the code.
    """
    if beside:
        return metrics_of(verdicts.AGAINST)
    skipped = ("efficiency.speedup", "efficiency.mfu")
    return [metric for metric in metrics_of("generation") if metric.per_device and metric.name not in skipped]


def kept(journal: Path, facts: dict[str, Any]) -> list[Rerun]:
    """The reruns in a journal of the same facts; a line that was cut off by a kill is not one.

    Raises BenchError where it has other facts, or is no such journal.
    """
    if not journal.exists():
        return []
    tables, way_out = [], "give another --journal, or delete it"
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BenchError(f"{journal} cannot be read: {error}; {way_out}") from None
    for line in lines:
        try:
            tables.append(strict_json(line))
        except ValueError:
            continue
    if not tables or not isinstance(tables[0], dict) or tables[0].get("kind") != "calibration":
        raise BenchError(f"{journal} is not the journal of a calibration; {way_out}")
    other = [
        f"{name} was {tables[0].get(name)!r}, is {now!r}" for name, now in facts.items() if tables[0].get(name) != now
    ]
    if other:
        raise BenchError(f"{journal}: {'; '.join(other)}; {way_out}")
    try:
        kept = [each for each in tables[1:] if isinstance(each, dict) and each.get("kind") == "rerun"]
        return [Rerun(own=_samples(each["own"]), base=_samples(each["base"])) for each in kept]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BenchError(f"{journal}: a rerun is damaged ({type(error).__name__}: {error}); {way_out}") from None


def _samples(table: Any) -> dict[str, list[float]]:
    return {name: [finite(each) for each in values] for name, values in table.items()}


def taken(given: argparse.Namespace, facts: dict[str, Any]) -> list[Rerun]:
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
        command += ["--beside"] if given.beside else []
        done = subprocess.run(command, env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              text=True, check=False)  # fmt: skip
        if done.returncode:
            raise BenchError(f"a measuring process ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return kept(given.journal, facts)


def _completed(given: argparse.Namespace, facts: dict[str, Any], reruns: list[Rerun]) -> list[Rerun]:
    """As `taken`, in this process."""
    import compression

    if len(reruns) >= given.reruns:
        return reruns
    base = compression.open_base(given.base, given.device, dequantize=True)
    compressed = compression.compress(base, compression.Recipe.parse(given.model)).model
    load = Load(prompt_tokens=given.prompt_tokens, new_tokens=given.max_new_tokens)
    given.journal.parent.mkdir(parents=True, exist_ok=True)
    most = verdicts.MORE[-1] * given.runs
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
            one = rerun(base.model, compressed, load, seconds=given.seconds, most=most, beside=given.beside)
            took = time.time() - begun
            append({"kind": "rerun", "at": round(begun), "process": os.getpid(), "seconds": round(took, 2),
                    "own": one.own, "base": one.base})  # fmt: skip
            reruns.append(one)
    return reruns
