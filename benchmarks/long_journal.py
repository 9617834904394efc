"""How commands that read a journal grow with it: seconds and peak memory at two lengths, and their quotients.

python benchmarks/long_journal.py                        # 50,000 and 500,000 lines; minutes
python benchmarks/long_journal.py --lines 5000,50000
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.metrics import metrics_of
from bench.results.checksums import sealed
from bench.results.row import SCHEMA, Row

RECIPES = ("fp16", "nf4", "rtn", "gptq", "awq", "hqq", "wanda")
KINDS = ("artefact", "generation", "perplexity")
COMMANDS = {
    "history": ("-m", "bench", "history"),
    "digest": ("-m", "bench", "digest"),
    "report": ("-m", "bench", "report", "--out", "report"),
    "resume": ("-c", "import sys; from bench.results.journal import resume; assert resume(sys.argv[2])", "--journal"),
}


def records(lines: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """At least so many records of whole runs, as the benchmarks write them; the last run has not ended."""
    numbers, written, when = random.Random(seed), 0, 1.7e9
    context = {"base": "reference", "base_hash": "ab" * 32, "fingerprint": "cpu-x", "seed": 0, "torch": "2.13.0",
               "python": "3.11", "data_hash": {"perplexity": "cd" * 32}, "schema": SCHEMA}  # fmt: skip
    run = 0
    while written < lines:
        name, verdicts = f"run-{run:06d}", []
        found: list[dict[str, Any]] = [{"kind": "run", "context": {**context, "commit": f"{run // 3:040x}"}}]
        for recipe in RECIPES:
            for of in KINDS:
                found.append({"kind": "begin", "of": of, "recipe": recipe, "params": {"batch": 1}, "data": None})
                for metric in metrics_of(of):
                    noise = 0.0 if metric.kind in ("counted", "deterministic") else numbers.gauss(0, 0.02)
                    value = round(100 * (1 + noise), 6)
                    samples = tuple(round(value + numbers.gauss(0, 2), 4) for _ in range(10)) if noise else ()
                    row = Row(run=name, base="reference", base_hash="ab" * 32, recipe=recipe, device="cpu-x",
                              metric=metric.name, value=value, unit=metric.unit, better=metric.better, base_value=100.0,
                              ratio=value / 100, samples=samples, base_samples=samples, params={"batch": 1}, seed=0,
                              of=of)  # fmt: skip
                    found.append({"kind": "row", **row.to_json()})
                    verdicts.append({"kind": "verdict", "recipe": recipe, "key": row.key, "outcome": "pass",
                                     "words": f"{recipe}: {row.key} passes"})  # fmt: skip
        found += verdicts
        written += len(found) + 1
        found += [{"kind": "end", "status": "passed"}] if written < lines else []
        for each in found:
            when += 0.01
            yield {"time": when, "run": name, **each}
        run += 1


def write(path: Path, lines: int) -> None:
    """A journal of at least so many lines."""
    with open(path, "wb") as file:
        file.writelines(sealed(json.dumps(each)) + b"\n" for each in records(lines))


def measured(command: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """Seconds of processor time and peak MiB of one command on `journal.jsonl` of a folder."""
    arguments = [sys.executable, *command, *(() if command[-1] == "--journal" else ("--journal",)), "journal.jsonl"]
    with open(os.devnull, "wb") as nowhere:
        child = subprocess.Popen(arguments, cwd=folder, stdout=nowhere)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {child.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lines", default="50000,500000", help="two lengths; default 50000,500000")
    options = parser.parse_args()
    lengths = [int(each) for each in options.lines.split(",")]
    print(f"| command | {' | '.join(f'{each:,} lines, s | MiB' for each in lengths)} | quotient of times |")
    print(f"|:---|{'---:|' * (2 * len(lengths) + 1)}")
    with tempfile.TemporaryDirectory() as root:
        folders = []
        for length in lengths:
            folders.append(Path(root) / str(length))
            folders[-1].mkdir()
            write(folders[-1] / "journal.jsonl", length)
        for name, command in COMMANDS.items():
            found = [measured(command, folder) for folder in folders]
            cells = " | ".join(f"{seconds:.1f} | {memory:.0f}" for seconds, memory in found)
            print(f"| {name} | {cells} | {found[-1][0] / found[0][0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
