"""What GPTQ of a large model costs, by a model of its time that is measured here and checked against whole runs.

    python benchmarks/cost_model.py [--out figures/cost-model.md]

Work of a block, for T tokens of calibration text and matrices (rows, cols) that share inputs:

    forward    the text through the block, twice: to see the inputs, and on to the next block    4 T rows cols FLOP
    sums       x x^T, its upper half                                                             T cols^2
    factor     the Cholesky factor of H                                                          cols^3 / 3
    rounding   columns, with the errors of those before                                          rows cols^2
    moved      half of H in fp64 to its owner, and the block in 16 bits to all                   bytes

Rates are those of one thread, measured at the widths of `random:tinyllama-1.1b`. N devices share samples (at most
LEAVES do) and matrices, the dearest first, as `compression.workers` deals them out; what one device has to do for its
matrices bounds a block. Predicted and measured are printed side by side for 1 and 2 processes. Widths that were not
measured are predictions, and so is every number of devices above 2; the rate at which bytes move between devices was
not measured, and is given (`--gigabytes`).
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import several_processes
import torch

from compression.architectures.random_shapes import SHAPES
from compression.calibration.observers import Hessian
from compression.calibration.sums import LEAVES
from compression.numeric.grids import AffineGrid
from compression.numeric.rounding import gptq, upper_factor
from compression.workers import dealt

MODELS = {  # blocks, width, MLP width, widths of keys and values
    "7B (Mistral)": (32, 4096, 14336, 1024),
    "70B (Llama 2)": (80, 8192, 28672, 1024),
    "405B (Llama 3.1)": (126, 16384, 53248, 1024),
}
DEVICES = (1, 2, 4, 8, 16, 32, 64)
SAMPLES, LENGTH = 128, 512
MEASURED = "tinyllama-1.1b"
PUBLISHED = {1: 745, 2: 372, 4: 264}  # s, GPTQ W4A16 of Llama-3-8B, documentation of llm-compressor 0.10
LLAMA_3_8B = (32, 4096, 14336, 1024)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device: FLOP per second of each kind of work, and bytes per second between devices."""

    forward: float
    sums: float
    factor: float
    rounding: float
    moved: float


def stacks(width: int, inner: int, keys: int) -> list[tuple[int, int]]:
    """The matrices of a block that share inputs, as one each: (rows, cols)."""
    return [(width + 2 * keys, width), (width, width), (2 * inner, width), (width, inner)]


def seconds_of_block(shape: tuple[int, int, int], tokens: int, devices: int, rates: Rates) -> float:
    """Of a block on so many devices."""
    matrices, readers = stacks(*shape), min(devices, LEAVES)
    weights = sum(rows * cols for rows, cols in matrices)
    read = 4 * tokens * weights / rates.forward + sum(tokens * cols**2 for _, cols in matrices) / rates.sums
    own = [cols**3 / 3 / rates.factor + rows * cols**2 / rates.rounding for rows, cols in matrices]
    loads = [0.0] * devices
    for owner, seconds in zip(dealt(own, devices), own, strict=True):
        loads[owner] += seconds
    moved = 0.0
    if devices > 1:
        moved = (sum(8 * cols**2 / 2 for _, cols in matrices) + 2 * weights) / rates.moved
    return read / readers + max(loads) + moved


def timed(act: Callable[[], Any], rounds: int = 3) -> float:
    """Seconds, the median."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        found.append(time.perf_counter() - began)
    return median(found)


def measured_rates(gigabytes: float) -> Rates:
    """Of one thread of this machine."""
    import transformers

    shape = SHAPES[MEASURED] | {"num_hidden_layers": 1, "vocab_size": 512}
    config = transformers.LlamaConfig.from_dict({key: value for key, value in shape.items() if key != "dtype"})
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).to(getattr(torch, shape["dtype"]))
    ids = torch.randint(512, (1, LENGTH))
    width, inner = config.hidden_size, config.intermediate_size
    keys = width // config.num_attention_heads * config.num_key_value_heads
    weights = sum(rows * cols for rows, cols in stacks(width, inner, keys))
    with torch.inference_mode():
        forward = timed(lambda: model(input_ids=ids, use_cache=False), 5)
    x = torch.randn(LENGTH, inner)
    observer = Hessian(inner)
    observer.add(x)
    sums = timed(lambda: observer.add(x))
    for _ in range(2 * inner // LENGTH):
        observer.add(torch.randn(LENGTH, inner))
    whole = observer.value()
    factor = timed(lambda: upper_factor(whole, 0.01), 1)
    weight, grid = torch.randn(width, inner), AffineGrid(bits=4, group_size=128)
    everything = timed(lambda: gptq(weight, whole, grid, damp=0.01, act_order=True, params=grid.fit(weight)), 1)
    return Rates(
        forward=2 * LENGTH * weights / forward, sums=LENGTH * inner**2 / sums, factor=inner**3 / 3 / factor,
        rounding=width * inner**2 / max(everything - factor, 1e-9), moved=gigabytes * 1e9,
    )  # fmt: skip


def checked(rates: Rates, samples: int, rounds: int) -> Iterator[str]:
    """Two blocks of the measured widths by 1 and 2 processes, beside what the model says."""
    shape = SHAPES[MEASURED]
    keys = shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = (shape["hidden_size"], shape["intermediate_size"], keys)
    options = argparse.Namespace(recipe=f"gptq(samples={samples})", base=f"random:{several_processes.NAME}", blocks=2)
    for count, runs in several_processes.taken(options, (1, 2), rounds).items():
        seconds = median(run["seconds"] for run in runs)
        said = 2 * seconds_of_block(sizes, samples * LENGTH, count, rates)
        yield f"| {count} | {seconds:.0f} | {said:.0f} | {said / seconds:.2f} |"


def predicted(rates: Rates) -> Iterator[str]:
    """Hours by model and number of devices."""
    for name, (blocks, *shape) in MODELS.items():
        hours = [blocks * seconds_of_block(tuple(shape), SAMPLES * LENGTH, n, rates) / 3600 for n in DEVICES]
        yield f"| {name} | {' | '.join(f'{each:.1f}' for each in hours)} |"


def beside_published(rates: Rates) -> Iterator[str]:
    """Speed-ups of data-parallel GPTQ that are published, beside those of the model; and device-hours."""
    blocks, *shape = LLAMA_3_8B
    own = {n: blocks * seconds_of_block(tuple(shape), SAMPLES * LENGTH, n, rates) for n in PUBLISHED}
    for n, seconds in PUBLISHED.items():
        yield (f"| {n} | {PUBLISHED[1] / seconds:.2f} | {own[1] / own[n]:.2f} | {n * seconds / 3600:.2f} "
               f"| {n * own[n] / 3600:.1f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=16, help="of the runs that are measured")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="that move between devices in a second")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures" / "cost-model.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = measured_rates(options.gigabytes)
    heads = "| model | " + " | ".join(f"{n} devices" if n > 1 else "1 device" for n in DEVICES) + " |"
    command = "Measured by `python benchmarks/cost_model.py`."
    lines = [
        "# What GPTQ of a large model costs", "",
        "## Rates of one thread", "", command, "",
        "| work | GFLOP per second |", "| :--- | ---: |",
        *(f"| {name} | {getattr(rates, name) / 1e9:.0f} |" for name in ("forward", "sums", "factor", "rounding")), "",
        "## Predicted and measured", "", command, "",
        "| processes | measured, s | predicted, s | predicted / measured |", "| ---: | ---: | ---: | ---: |",
        *checked(rates, options.samples, options.rounds), "",
        "## Hours by devices", "", command, "",
        heads, "| :--- |" + " ---: |" * len(DEVICES), *predicted(rates), "",
        "## Beside published speed-ups", "", command, "",
        "| devices | published speed-up | predicted speed-up | published device-hours | predicted device-hours |",
        "| ---: | ---: | ---: | ---: | ---: |", *beside_published(rates),
    ]  # fmt: skip
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
