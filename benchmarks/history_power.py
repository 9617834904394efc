"""How often `python -m bench history` names a step that is there: python benchmarks/history_power.py

A history has 20 series of independent normal noise; one of them moves by so many standard deviations at a place. The
table says in how many of 100 histories that series is named, and in brackets in how many within one run of the place.
Below it: histories in which nothing moved, by the shape of the noise, and how many of them named anything.
"""

import argparse
from collections.abc import Callable

import numpy as np

from bench.commands.history import LEVEL
from bench.statistics.level_change import cut, steps, strongest

SERIES = 20
PLACES = ((27, 3), (25, 5), (10, 10), (18, 12), (36, 24))  # runs before the step, and from it on
SIZES = (1, 2, 3, 5, 10)  # standard deviations of the noise between runs
STILL = 300  # histories of 30 runs in which nothing moves

Noise = Callable[[np.random.Generator, int], np.ndarray]


def _remembering(numbers: np.random.Generator, size: int) -> np.ndarray:
    values = numbers.normal(size=size)
    for place in range(1, size):
        values[place] = 0.3 * values[place - 1] + (1 - 0.3**2) ** 0.5 * values[place]
    return values


NOISE: dict[str, Noise] = {
    "normal": lambda numbers, size: numbers.normal(size=size),
    "heavy tails (Cauchy)": lambda numbers, size: numbers.standard_cauchy(size),
    "two clock speeds": lambda numbers, size: numbers.choice([1, 1.3], size) * numbers.normal(1, 0.001, size),
    "few distinct values": lambda numbers, size: numbers.integers(0, 3, size).astype(float),
    "autocorrelation 0.3": _remembering,
}


def bursts(numbers: np.random.Generator, size: int) -> np.ndarray:
    """Normal noise of 1 %, and every tenth run on average twice as long."""
    return np.where(numbers.random(size) < 0.1, 200, 100) * numbers.normal(1, 0.01, size)


def found(before: int, since: int, size: float, histories: int, noise: Noise) -> tuple[int, int]:
    """In how many histories the moved series is named, and in how many within one run of its place."""
    numbers = np.random.default_rng([before, since, int(10 * size)])
    named = near = 0
    for _ in range(histories):
        still = [strongest(list(noise(numbers, before + since))).p for _ in range(SERIES - 1)]
        moved = noise(numbers, before + since) + size * (np.arange(before + since) >= before)
        level = cut([*still, strongest(list(moved)).p], LEVEL)
        places = [abs(step.place - before) for step in steps(list(moved), level)]
        named += bool(places)
        near += bool(places) and min(places) <= 1
    return named, near


def alarms(noise: Noise) -> int:
    """How many histories of 30 runs in which nothing moved name a series."""
    numbers = np.random.default_rng(0)
    return sum(
        cut([strongest(list(noise(numbers, 30))).p for _ in range(SERIES)], LEVEL) > 0 for _ in range(STILL)
    )  # fmt: skip


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--histories", type=int, default=100)
    histories = parser.parse_args().histories
    print("| runs before and since | " + " | ".join(map(str, SIZES)) + " |\n|:---|" + "---:|" * len(SIZES))
    for before, since in PLACES:
        cells = [found(before, since, size, histories, NOISE["normal"]) for size in SIZES]
        print(f"| {before} and {since} | " + " | ".join(f"{n} ({near})" for n, near in cells) + " |", flush=True)
    for before, since in PLACES[-2:]:
        n, near = found(before, since, 10, histories, bursts)
        print(f"\nbursts, {before} and {since} runs, 10 standard deviations: {n} ({near})", flush=True)
    print("\n| noise | histories that name a series, of 300 |\n|:---|---:|")
    for shape, noise in NOISE.items():
        print(f"| {shape} | {alarms(noise)} |", flush=True)


if __name__ == "__main__":
    main()
