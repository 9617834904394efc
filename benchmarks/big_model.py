"""Compressing a checkpoint of Mistral-7B's widths by several processes that are killed and go on: memory and bytes.

    python benchmarks/big_model.py [--recipe "gptq(samples=16)"] [--processes 2] [--layers 2,4] [--folder FOLDER]

The checkpoint has seeded weights, `--layers` blocks and four shards. Each process has one thread, holds one block and
one part of the samples of random calibration text. For each number of layers: a run that is killed (SIGKILL to all of
its processes) once its first block is finished, and that is started again; for the first number also one that nobody
disturbs, whose tensors must be the same. Peak memory is that of the dearest process; that it does not grow with the
number of layers shows that nobody holds the model.
"""

import argparse
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import compression
from compression.architectures.random_shapes import SHAPES
from compression.workers import joined

ROOT = Path(compression.__file__).parents[1]
SHARDS = 4
FIRST_BLOCK = "model-00002-of-*.safetensors"


def checkpoint(folder: Path, layers: int) -> Path:
    """A checkpoint of seeded weights in four shards, made if it is not there."""
    import torch
    import transformers

    target = folder / f"mistral-{layers}"
    if (target / "config.json").exists():
        return target
    shape = SHAPES["mistral-7b"] | {"num_hidden_layers": layers, "vocab_size": 512}
    config = transformers.MistralConfig.from_dict({key: value for key, value in shape.items() if key != "dtype"})
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        tensor.fill_(1) if "norm" in name else tensor.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(target, max_shard_size=-(-size // (SHARDS - 1)) * 19 // 20)
    return target


def child(base: Path, recipe: str, out: Path) -> None:
    """One of the processes; the first prints what it measured."""
    with joined("cpu") as (group, device):
        compression.compress(str(base), recipe, into=out, device=device, calibration="random", workers=group)
        peaks = group.everyone(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if group.rank == 0:
            print(json.dumps({"peak_bytes": max(peaks)}), flush=True)


def start(options: argparse.Namespace, base: Path, out: Path) -> "subprocess.Popen[str]":
    """The processes, in a session of their own."""
    count = str(options.processes)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, __file__]
    line += ["--child", str(out), "--base", str(base), "--recipe", options.recipe]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True)


def finished(process: "subprocess.Popen[str]") -> tuple[float, float]:
    """Seconds, and the peak of a process in bytes."""
    began = time.monotonic()
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the processes must end with 0, but ended with {process.returncode}")
    return time.monotonic() - began, json.loads(said.splitlines()[-1])["peak_bytes"]


def killed(process: "subprocess.Popen[str]", out: Path) -> float:
    """Kill all processes as soon as one block is finished; the seconds until then."""
    began = time.monotonic()
    while not any(out.parent.glob(f"*{out.name}*/{FIRST_BLOCK}")):
        if process.poll() is not None:
            raise SystemExit(f"the processes ended with {process.returncode} before a block was finished")
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return time.monotonic() - began


def tensors(folder: Path) -> dict[str, str]:
    """A digest of every tensor by name."""
    import torch
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name).contiguous().view(-1)
                found[name] = hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="gptq(samples=16)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", default="2,4")
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept; default a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures" / "big-model.md")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.base, options.recipe, options.child)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for place, layers in enumerate(map(int, options.layers.split(","))):
            base = checkpoint(options.folder or Path(folder), layers)
            whole, shards = sum(path.stat().st_size for path in base.glob("*.safetensors")), base.glob("*.safetensors")
            out = Path(folder) / f"killed-{layers}"
            before = killed(start(options, base, out), out)
            seconds, peak = finished(start(options, base, out))
            alone, alike = "", ""
            if place == 0:
                undisturbed = Path(folder) / "undisturbed"
                alone, alike = f"{finished(start(options, base, undisturbed))[0]:.0f}", "the same"
                if tensors(out) != tensors(undisturbed):
                    raise SystemExit(f"{out} must hold the tensors of {undisturbed}, but does not")
            cells = (layers, f"{whole / 2**20:.0f}", len(list(shards)), f"{before:.0f}", f"{seconds:.0f}", alone,
                     f"{peak / 2**20:.0f}", alike)  # fmt: skip
            rows.append(f"| {' | '.join(map(str, cells))} |")
            print(rows[-1], flush=True)
    lines = [
        "# A model of which nobody holds more than a block", "", "## Two processes, killed and started again", "",
        f"`{options.recipe}`, {options.processes} processes of one thread.", "",
        "Measured by `python benchmarks/big_model.py`.", "",
        "| layers | checkpoint, MiB | shards | killed after, s | then, s | undisturbed, s | peak of a process, MiB "
        "| tensors beside the undisturbed run |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | :--- |", *rows,
    ]  # fmt: skip
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
