"""Compressing with one process and with several, side by side, in one run: the speed-up, and that the bytes are equal.

    python benchmarks/several_processes.py [--recipe "gptq(samples=16)"] [--processes 1,2] [--blocks 2] [--rounds 2]

The base has the blocks of `random:tinyllama-1.1b`, cut to `--blocks` of them, with a vocabulary of 512, or is what
`--base` names. Every process has one thread, so that they can share cores; the numbers of processes take turns. A time
is that of the compression itself, as the first process measures it, without start and imports. Peak memory is that of
the dearest process. What was written is compared tensor by tensor before a figure is printed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))

import compression
from compression.architectures.random_shapes import SHAPES
from compression.workers import joined

ROOT = Path(compression.__file__).parents[1]
NAME = "two-blocks"


def child(base, recipe, blocks, folder):
    """One of the processes; the first prints what it measured."""
    SHAPES[NAME] = SHAPES["tinyllama-1.1b"] | {"num_hidden_layers": blocks, "vocab_size": 512}
    with joined("cpu") as (group, device):
        text = None if base == "reference" else "random"
        compression.compress(base, recipe, into=folder, device=device, calibration=text, workers=group)
        state = json.loads((folder / "compression.json").read_text())["cost"] if group.rank == 0 else None
        peaks = group.everyone(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if group.rank == 0:
            print(json.dumps({"seconds": state["seconds"], "peak_bytes": max(peaks)}))


def measured(options, count, folder):
    """Seconds and peak memory of a run of `count` processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__]
    given = {"child": folder, "recipe": options.recipe, "base": options.base, "blocks": options.blocks}
    start += [text for name, value in given.items() for text in (f"--{name}", str(value))]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(start, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def same(first, second):
    """Whether two folders hold the same tensors, byte for byte."""
    for path in sorted(first.glob("*.safetensors")):
        with safe_open(path, "pt") as one, safe_open(second / path.name, "pt") as other:
            names = set(one.keys())
            if names != set(other.keys()):
                return False
            if not all(one.get_tensor(name).equal(other.get_tensor(name)) for name in names):
                return False
    return True


def taken(options, counts, rounds):
    """What the runs of each number of processes measured, in turn.

    Raises:
        SystemExit: they did not write the same bytes.
    """
    found = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for count in counts:
                found[count].append(measured(options, count, Path(folder) / f"{number}-{count}"))
        first, *others = [Path(folder) / f"{number}-{count}" for number in range(rounds) for count in counts]
        if not all(same(first, other) for other in others):
            raise SystemExit("the bytes differ")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="gptq(samples=16)")
    parser.add_argument("--base", default=f"random:{NAME}")
    parser.add_argument("--processes", default="1,2", help="numbers of processes that take turns")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.base, options.recipe, options.blocks, options.child)
        return
    counts = [int(count) for count in options.processes.split(",")]
    found = taken(options, counts, options.rounds)
    folders = options.rounds * len(counts)
    print(f"{options.recipe} on {options.base}: {folders} folders of the same bytes")
    alone = median(each["seconds"] for each in found[counts[0]])
    for count, runs in found.items():
        seconds = [each["seconds"] for each in runs]
        peak, factor = max(each["peak_bytes"] for each in runs) / 2**20, alone / median(seconds)
        print(f"{count} processes: {median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), {factor:.2f} "
              f"times as fast as {counts[0]}, peak {peak:.0f} MiB per process")  # fmt: skip


if __name__ == "__main__":
    main()
