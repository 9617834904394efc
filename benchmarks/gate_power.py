"""What the gate raises and finds on recorded noise: false alarms of runs of many rows, and slowdowns of decode.

    python benchmarks/gate_power.py [--runs 10000] [--rows 100] [--tolerance 0.01]

Noise is resampled from rounds that were recorded on a shared machine (`gate_noise.json`, which says how): stretches of
ten neighbouring pairs, so that what follows on each other stays together. Further noise is added on the clock that both
models share: drift over a run, bursts, a clock of two speeds. Each row has noise of its own, the machine of a run is up
to a tenth faster or slower than that of its baseline, and rows of a run that share their rounds would alarm together,
that is less often. The rule is the gate's own code; `tests/bench/gate/test_gate_power.py` holds the two together.

Conditions that begin with "beside" are of `--against`: rounds of two copies of one model, and no recorded times. Every
process that takes part is off by a share of its own (PROCESSES). "beside crowded" is the noise of a machine on which
four to seven other processes want its two processors.

Beside it stands what `pytest-benchmark compare --benchmark-compare-fail=median:5%` says of the same rounds of the
compressed model: the usual ten, the base not looked at.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.gate import verdicts as gate
from bench.metrics import METRICS, Metric, all_metrics
from bench.statistics.timing_change import moved, quantile

BLOCK = 10  # neighbouring pairs that stay together
USUAL = 10  # rounds of a run
CHUNK = 10_000  # rows at once
CONDITIONS = (  # recorded noise, and what is added to it
    "calm", "calm + strong drift", "calm + strong bursts", "calm + strong bimodal",
    "stalls", "stalls + drift", "stalls + bursts", "stalls + bimodal", "stalls + strong bimodal", "starved",
    "beside", "beside + drift", "beside + bursts", "beside + bimodal",
    "beside + strong drift", "beside + strong bursts", "beside + strong bimodal", "beside crowded",
)  # fmt: skip
ADDED = {
    "drift": 0.05,  # up to 5 % over a run, either way
    "strong drift": 0.15,
    "bursts": 0.01,  # begin in every 100th round; 6 rounds long on average, each half as slow again or slower
    "strong bursts": 0.05,
    "bimodal": 0.1,  # a clock that is 10 % slower half of the time, in turns of 40 rounds on average
    "strong bimodal": 0.2,
}
PROCESSES = 0.003  # standard deviation between processes with equal code
TURNS = (0, 10, 20, 30, 40, 60, 80, 100)  # rounds at which `bench.measure.against.commit` starts new ones
PEER = 0.05  # of pytest-benchmark
OUTCOMES = ("pass", "inconclusive", "regressed", "improved")
PASS, INCONCLUSIVE, REGRESSED, IMPROVED = range(4)


class Rounds(NamedTuple):
    """Logarithms of the times of both models, (rows, rounds) each."""

    own: np.ndarray
    base: np.ndarray


def recorded(condition: str) -> list[np.ndarray]:
    """Sessions of logarithms (rounds, 2) of own and base, in ms per token."""
    table = json.loads(Path(__file__).with_name("gate_noise.json").read_text(encoding="utf-8"))
    unit, where = ("step_ms", "stalls") if condition == "calm" else ("ms", condition)
    return [
        np.log([each[f"own_{unit}"], each[f"base_{unit}"]]).T
        for each in table["sessions"]
        if each["condition"] == where
    ]


def draw(condition: str, rows: int, rounds: int, numbers: np.random.Generator) -> Rounds:
    """Noise of one of CONDITIONS."""
    recording, _, added = condition.partition(" + ")
    stretches = np.concatenate(
        [np.lib.stride_tricks.sliding_window_view(each, BLOCK, axis=0).swapaxes(1, 2) for each in recorded(recording)]
    )
    picked = stretches[numbers.integers(0, len(stretches), (rows, -(-rounds // BLOCK)))]
    pairs = picked.reshape(rows, -1, 2)[:, :rounds] + numbers.uniform(-0.1, 0.1, (rows, 1, 1))
    clock = _added(added, rows, 2 * rounds, numbers)  # the base's round comes before
    return Rounds(own=pairs[..., 0] + clock[:, 1::2], base=pairs[..., 1] + clock[:, ::2])


def _added(added: str, rows: int, slots: int, numbers: np.random.Generator) -> np.ndarray:
    """What the machine adds to the logarithm of the time of each slot, the place of one round; (rows, slots)."""
    if not added:
        return np.zeros((1, slots))
    strength, at = ADDED[added], np.arange(slots)
    if "drift" in added:
        return numbers.uniform(-strength, strength, (rows, 1)) * at / slots
    if "bursts" in added:
        cost = np.zeros((rows, slots))
        begins = numbers.random((rows, slots)) < strength
        heavy = np.log1p(0.5 + numbers.exponential(0.5, (rows, slots)))
        lasts = numbers.geometric(1 / 6, (rows, slots))
        for after in range(20):
            alive = begins & (lasts > after)
            np.maximum(cost[:, after:], (heavy * alive)[:, : slots - after], out=cost[:, after:])
        return cost
    changes = numbers.random((rows, slots)) < 1 / 40
    return math.log1p(strength) * ((changes.cumsum(1) + numbers.integers(0, 2, (rows, 1))) % 2)


def verdicts(now: Rounds, then: Rounds, metric: Metric, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Last outcome of each row, one of OUTCOMES by place, and the rounds that it took; (rows,) both.

    `now` has as many rounds as the gate may ask for.
    """
    rows = len(now.own)
    outcome, before, taken = (np.full(rows, each) for each in (PASS, -1, 0))
    open_ = np.arange(rows)
    for times in (1, *gate.MORE):
        seen = [Rounds(*(side[open_] for side in run)) for run in (now, then)]
        so_far = [Rounds(*(side[:, : times * USUAL] for side in run)) for run in seen]
        found = look(so_far[0], so_far[1] if metric.of == gate.AGAINST else seen[1], metric, level)
        outcome[open_], taken[open_] = found, times * USUAL
        decided = (found == PASS) | ((found != INCONCLUSIVE) & (found == before[open_]))
        before[open_] = found
        open_ = open_[~decided]
    return outcome, taken


def look(now: Rounds, then: Rounds, metric: Metric, level: float) -> np.ndarray:
    """One look at rows of a metric of which less is better: the worse of ratio and value, as `gate` concludes.

    Of two states of the code the values alone, of which `rel` is then the tolerance.
    """
    worst = np.zeros(len(now.own), dtype=int)
    middle = np.exp(np.median(then.own, 1))
    checks = gate.checks_of(metric, ratio=metric.of != gate.AGAINST)
    tail = gate.one_sided(level, len(checks))
    for allowed, to_base in checks:
        sides = 2 if to_base else 1
        pair = ((now.own, then.own), ()) if metric.of == gate.AGAINST else (now[:sides], then[:sides])
        log, error, degrees = moved(*pair, metric.best)
        degrees = degrees.astype(int)
        reach = np.array([0, *(quantile(tail, each + 1) for each in range(degrees.max(initial=0)))])
        low, change, high = (np.expm1(log + sign * reach[degrees] * error) for sign in (-1, 0, 1))
        found = np.where(high < -allowed, IMPROVED, PASS)
        found = np.where(change > allowed, np.where(low > allowed, REGRESSED, INCONCLUSIVE), found)
        found = np.where(abs(change) * middle <= metric.floor, PASS, found)
        rank = np.array([0, 2, 3, 1])  # of pass, inconclusive, regressed, improved
        worst = np.where(rank[found] > rank[worst], found, worst)
    return worst


def peer(now: Rounds, then: Rounds) -> np.ndarray:
    """Whether the median of the compressed model's usual rounds is beyond PEER of the recorded one; (rows,)."""
    medians = [np.median(each.own[:, :USUAL], 1) for each in (now, then)]
    return np.expm1(medians[0] - medians[1]) > PEER


class Shares(NamedTuple):
    """Of runs, or of rows where a slowdown is looked for; `rounds` are those of a row on average."""

    regressed: float
    improved: float
    inconclusive: float
    peer: float
    rounds: float


def false_alarms(
    condition: str, runs: int, rows: int, *, recorded_rounds: int, tolerance: float | None = None, seed: int = 0
) -> Shares:
    """Shares of runs of so many unchanged rows with at least one such outcome; `tolerance` as the metric's if None."""
    metric, level = _decode(condition, tolerance), gate.LEVEL / 2 / rows
    counts, rounds = np.zeros(4), 0.0
    step = max(1, CHUNK // rows)
    for done, numbers in _chunks(runs, step, seed):
        now, then, earlier = _pair(condition, done * rows, recorded_rounds, numbers)
        outcome, taken = verdicts(now, then, metric, level)
        runs_with = [outcome == REGRESSED, outcome == IMPROVED, outcome == INCONCLUSIVE, peer(now, earlier)]
        counts += [each.reshape(done, rows).any(1).sum() for each in runs_with]
        rounds += taken.sum()
    return Shares(*(counts / runs).tolist(), rounds / runs / rows)


def found(
    condition: str, slower: float, runs: int, rows: int, *, recorded_rounds: int, tolerance: float | None = None,
    seed: int = 1,
) -> Shares:  # fmt: skip
    """Shares of runs in which a decode that is slower by that share is said to be, at the level of a run of rows."""
    metric, level = _decode(condition, tolerance), gate.LEVEL / 2 / rows
    counts, rounds = np.zeros(4), 0.0
    for done, numbers in _chunks(runs, CHUNK, seed):
        now, then, earlier = _pair(condition, done, recorded_rounds, numbers)
        now = now._replace(own=now.own + math.log1p(slower))
        outcome, taken = verdicts(now, then, metric, level)
        counts += [
            (each).sum()
            for each in (outcome == REGRESSED, outcome == IMPROVED, outcome == INCONCLUSIVE, peer(now, earlier))
        ]
        rounds += taken.sum()
    return Shares(*(counts / runs).tolist(), rounds / runs)


def _pair(
    condition: str, rows: int, recorded_rounds: int, numbers: np.random.Generator
) -> tuple[Rounds, Rounds, Rounds]:
    """This run, what it is compared with, and an earlier run, which is that where no other code runs beside it."""
    now, earlier = (draw(condition, rows, rounds, numbers) for rounds in (gate.MORE[-1] * USUAL, recorded_rounds))
    if not condition.startswith("beside"):
        return now, earlier, earlier
    lasts = np.diff(TURNS)
    own, other = (side + np.repeat(numbers.normal(0, PROCESSES, (rows, len(lasts))), lasts, axis=1) for side in now)
    return Rounds(own, other), Rounds(other, own), earlier


def _chunks(total: int, step: int, seed: int) -> Iterator[tuple[int, np.random.Generator]]:
    for number, start in enumerate(range(0, total, step)):
        yield min(step, total - start), np.random.default_rng([seed, number])


def _decode(condition: str, tolerance: float | None) -> Metric:
    all_metrics()
    metric = METRICS["against.decode_ms" if condition.startswith("beside") else "efficiency.decode_ms"]
    return metric if tolerance is None else replace(metric, rel=tolerance)


def main() -> None:
    """Print the table of docs/methodology/gate-power.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--recorded-rounds", type=int, default=gate.MORE[-1] * USUAL)
    parser.add_argument("--tolerance", type=float, help="in place of the metric's own, of a ratio")
    given = parser.parse_args()
    percent, known = "{:.2f}".format, {"recorded_rounds": given.recorded_rounds, "tolerance": given.tolerance}
    print(f"{given.runs} runs of {given.rows} rows, {given.recorded_rounds} rounds recorded; shares in %\n")
    print("| noise | any alarm | improved | any inconclusive | rounds of a row | 5 % found | rounds | 10 % found "
          "| rounds | peer: any alarm | peer: 5 % found | peer: 10 % found |")  # fmt: skip
    print("|:---|" + "---:|" * 11)
    for condition in given.conditions.split(","):
        same = false_alarms(condition, given.runs, given.rows, **known)
        five, ten = (found(condition, slower, given.runs, given.rows, **known) for slower in (0.05, 0.10))
        cells = [
            percent(100 * (same.regressed + same.improved)), percent(100 * same.improved),
            percent(100 * same.inconclusive), f"{same.rounds:.1f}",
            percent(100 * five.regressed), f"{five.rounds:.1f}", percent(100 * ten.regressed), f"{ten.rounds:.1f}",
            *(percent(100 * each.peer) for each in (same, five, ten)),
        ]  # fmt: skip
        print(f"| {condition} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
