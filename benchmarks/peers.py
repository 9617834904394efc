"""GPTQ, AWQ, HQQ and SparseGPT beside the libraries that users know, on the same work, in one run: tox -e peers

    python benchmarks/peers.py [--tasks layer,block,...] [--libraries ours,plain,...] [--rounds 1] [--threads 2]

Every library runs in a process of an environment of its own (they want different versions of each other's parts, all
of them the torch of constraints.txt), made on first use under --environments and kept. A library that cannot be
installed, or fails, has a row that says so. `contenders.py` holds the work, and what is on the clock.

    layer      one linear layer, correlated inputs: Hessian, then GPTQ; 4 bits, groups of 128, symmetric, damping 0.01
    block      a model of one TinyLlama-shaped decoder block, from token ids to the compressed model: GPTQ as above
    hqq        one linear layer: HQQ, 4 bits, groups of 64, no data
    awq        a model of 4 blocks, 512 wide, bf16: AWQ, 4 bits, groups of 128, zero points, 20 ratios
    sparsegpt  the layer's weight and inputs: Hessian, then SparseGPT; half of the weights, free and 2:4, damping 0.01

Times are the best of --rounds, in which libraries take turns; a figure in brackets is that of the library / ours.
Errors are judged here, from what each library left: of GPTQ and SparseGPT on a layer ||x (W - Q)|| / ||x W|| over the
first 8 samples (rows `nearest`, and `wanda` and `magnitude`, are what simpler ways leave), of HQQ its own objective
sum |W - Q|^0.7 / sum |W|^0.7, of models the relative distance of the logits on held-out ids from those of the dense
model. The Hessian's is its relative distance from the full product in fp32 (row `plain`), both divided by their trace.
Memory is the peak of the process above where its first clocked work began.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import GROUP, LIBRARIES, PATTERN, weight_and_inputs
from torch import Tensor
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parents[1]
HERE = ("ours", "ours_static", "plain")  # libraries that run in this environment
REQUIREMENTS = {
    "llmcompressor": ("llmcompressor==0.14.0",),
    "gptqmodel": ("gptqmodel==7.6.0", "transformers==5.23.0", "optimum>=2"),
    "hqq": ("hqq==0.2.8.post1",),
}
MODELS = {  # shapes of the Llama models that are made for the tasks on a whole model
    "block": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1, "num_attention_heads": 32,
              "num_key_value_heads": 4},
    "awq": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 4},
}  # fmt: skip
VOCABULARY = 512
HELD_OUT = 48  # samples of the reference's test text
LIMIT = 1800  # seconds for one library on one task

Row = dict[str, Any]


# --- Environments -----------------------------------------------------------------------------------------------------


def interpreter(library: str, environments: Path) -> str:
    """The python of a library's environment, made if it is not there.

    Raises:
        RuntimeError: it cannot be made; the last line that pip wrote.
    """
    if library in HERE:
        return sys.executable
    torch_pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    wanted = [torch_pin, *REQUIREMENTS[library]]
    key = hashlib.sha256(" ".join([*wanted, sys.version]).encode()).hexdigest()[:8]
    folder = environments / f"{library}-{key}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making {folder}: {' '.join(wanted)}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        (folder / "constraints.txt").write_text(torch_pin + "\n")
        pip = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True,
                             env=os.environ | {"PIP_CONSTRAINT": str(folder / "constraints.txt")})  # fmt: skip
        if pip.returncode:
            raise RuntimeError(f"cannot be installed: {last_line(pip.stderr)}")
        (folder / "complete").touch()
    return str(python)


def run(library: str, task: str, folder: Path, options: Row, environments: Path) -> Row:
    """What the library took, or {"failed": why}."""
    try:
        python = interpreter(library, environments)
        done = subprocess.run(
            [python, Path(__file__).with_name("contenders.py"), library, task, folder, json.dumps(options)],
            capture_output=True, text=True, timeout=LIMIT, cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": str(options["threads"]), "PYTHONPATH": str(ROOT),
                              "GPTQMODEL_CPU_WORKERS": str(max(2, options["threads"]))},
        )  # fmt: skip
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"failed": str(error)}
    if done.returncode:
        return {"failed": last_line(done.stderr) or f"it ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# --- Tasks: what they need, and who judges ----------------------------------------------------------------------------


def make_model(task: str, folder: Path, options: Row) -> Tensor:
    """A random Llama with channels of uneven size, token ids to calibrate on and others; its logits on the others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from compression.checkpoints.base import byte_tokenizer

    torch.manual_seed(options["seed"])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, **MODELS[task])).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data.copy_(torch.exp(0.5 * torch.randn(parameter.shape)))
    model.to(getattr(torch, options["dtype"])).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for name, samples in (("calibration", options["samples"]), ("held_out", 4)):
        torch.save(torch.randint(VOCABULARY, (samples, options["length"])), folder / f"{name}.pt")
    with torch.no_grad():
        return model.float()(input_ids=torch.load(folder / "held_out.pt", weights_only=True)).logits


def copy_reference(folder: Path, options: Row) -> Tensor:
    """The embedded reference, ids of its training text to calibrate on, and of its test text, which it returns."""
    from transformers import AutoTokenizer

    from bench.reference import folder as shipped
    from bench.reference import world

    shutil.copytree(shipped("student"), folder / "model")
    vocabulary = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True, trust_remote_code=False)
    texts = {"calibration": world.stream("train", options["seed"]), "held_out": iter(world.texts("test"))}
    for name, samples in (("calibration", options["samples"]), ("held_out", HELD_OUT)):
        ids: list[int] = []
        while len(ids) < samples * options["length"]:
            ids += vocabulary.encode(next(texts[name]) + "\n\n", add_special_tokens=False, verbose=False)
        torch.save(torch.tensor(ids[: samples * options["length"]]).view(samples, -1), folder / f"{name}.pt")
    return torch.load(folder / "held_out.pt", weights_only=True)


def judge_layer(answers: dict[str, dict[str, Tensor]], options: Row) -> dict[str, dict[str, float]]:
    weight, inputs = weight_and_inputs(options)
    x = torch.cat([x for _, x in zip(range(8), inputs(), strict=False)])
    y = x @ weight.t()
    groups = weight.view(len(weight), -1, GROUP)
    scales = groups.abs().amax(-1, keepdim=True) / 7.5
    nearest = ((groups / scales).round_().clamp_(-8, 7) * scales).view_as(weight)
    found = {"nearest": {"output error": distance(x @ nearest.t(), y)}}
    full = answers.get("plain", {}).get("hessian")
    for library, answer in answers.items():
        found[library] = {"output error": distance(x @ answer["quantized"].float().t(), y)}
        if full is not None and library != "plain":
            theirs = answer["hessian"]
            found[library]["Hessian's distance"] = distance(theirs / theirs.trace(), full / full.trace())
    return found


def judge_sparsegpt(answers: dict[str, dict[str, Tensor]], options: Row) -> dict[str, dict[str, float]]:
    weight, inputs = weight_and_inputs(options)
    x = torch.cat([x for _, x in zip(range(8), inputs(), strict=False)])
    y = x @ weight.t()
    sizes = {"wanda": weight.abs() * x.norm(dim=0), "magnitude": weight.abs()}  # wanda's norms over the same samples
    for name, scores in sizes.items():
        free = scores > (scores.median(1, keepdim=True).values if name == "wanda" else scores.median())
        groups = scores.view(len(scores), -1, PATTERN[1])
        pattern = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(PATTERN[0]).indices, True)
        answers = answers | {name: {"free": weight * free, "pattern": weight * pattern.view_as(weight)}}
    return {
        library: {
            "output error": distance(x @ answer["free"].t(), y),
            "output error 2:4": distance(x @ answer["pattern"].t(), y),
            "zeros": float((answer["free"] == 0).float().mean()),
        }
        for library, answer in answers.items()
    }


def judge_hqq(answers: dict[str, dict[str, Tensor]], options: Row) -> dict[str, dict[str, float]]:
    weight, _ = weight_and_inputs(options)
    whole = float(weight.abs().pow(0.7).sum())
    return {library: {"own objective": float((weight - answer["quantized"]).abs().pow(0.7).sum()) / whole}
            for library, answer in answers.items()}  # fmt: skip


def judge_model(answers: dict[str, dict[str, Tensor]], dense: Tensor) -> dict[str, dict[str, float]]:
    return {library: {"logits' error": distance(answer["logits"], dense)} for library, answer in answers.items()}


def judge_reference(answers: dict[str, dict[str, Tensor]], ids: Tensor) -> dict[str, dict[str, float]]:
    return {library: {"perplexity": math.exp(cross_entropy(answer["logits"][:, :-1].mT, ids[:, 1:]))}
            for library, answer in answers.items()}  # fmt: skip


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


JUDGES: dict[str, Callable[..., dict[str, dict[str, float]]]] = {
    "layer": judge_layer,
    "block": judge_model,
    "hqq": judge_hqq,
    "sparsegpt": judge_sparsegpt,
    "awq": judge_model,
    "awq_reference": judge_reference,
}
WORK = {"awq_reference": "awq"}  # what the libraries do, where it is not called as the task is


def compare(task: str, libraries: Iterable[str], options: Row, rounds: int, environments: Path) -> dict[str, Row]:
    """A row for each library that has the task."""
    work = WORK.get(task, task)
    libraries = [library for library in libraries if hasattr(LIBRARIES[library], work)]
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make = copy_reference if work != task else partial(make_model, task) if task in MODELS else None
        made = None if make is None else make(folder, options)
        for _ in range(rounds):
            for library in libraries:
                print(f"{task}: {library}", file=sys.stderr, flush=True)
                new, old = run(library, work, folder, options, environments), rows.get(library)
                if old is not None and "failed" not in new and "failed" not in old:
                    new["seconds"] = {name: min(new["seconds"][name], old["seconds"][name]) for name in new["seconds"]}
                rows[library] = new
        answers = {
            library: torch.load(folder / f"{work}.{library}.pt", weights_only=True)
            for library in libraries
            if "failed" not in rows[library]
        }
        for library, errors in JUDGES[task](answers, options if made is None else made).items():
            rows.setdefault(library, {})["errors"] = errors
    return rows


# --- The table --------------------------------------------------------------------------------------------------------


def table(task: str, rows: dict[str, Row]) -> str:
    """Markdown; a figure in brackets is that of the library / ours."""
    ours = figures(rows.get("ours", {}))
    columns = list(dict.fromkeys(name for row in rows.values() for name in figures(row))) or ["result"]
    lines = [f"| {task} | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for library, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name_of(library)} | {row['failed'].replace('|', '/')} |" + " |" * (len(columns) - 1))
            continue
        cells, found = [], figures(row)
        for column in columns:
            cell = f"{found[column]:.3g}" if column in found else ""
            if column in found and library != "ours" and ours.get(column):
                cell += f" ({found[column] / ours[column]:.3g})"
            cells.append(cell)
        lines.append(f"| {name_of(library)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures(row: Row) -> dict[str, float]:
    found = {f"{name}, s": seconds for name, seconds in row.get("seconds", {}).items()}
    if "peak_mib" in row:
        found["memory, MiB"] = row["peak_mib"]
    return found | row.get("errors", {})


def name_of(library: str) -> str:
    return REQUIREMENTS[library][0].replace("==", " ") if library in REQUIREMENTS else library


TASKS: dict[str, Row] = {  # options that the command line does not give
    "layer": {"repeats": 3},
    "block": {"dtype": "float32"},
    "hqq": {"repeats": 3},
    "awq": {"dtype": "bfloat16"},  # gptqmodel takes no fp32 there
    "awq_reference": {"dtype": "bfloat16"},
    "sparsegpt": {"repeats": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--libraries", default=",".join(LIBRARIES))
    sizes = {"inputs": 4096, "outputs": 4096, "samples": 128, "length": 512, "threads": 2, "seed": 0, "rounds": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--environments", type=Path, default=ROOT / ".tox" / "peers-environments")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    options = vars(parser.parse_args())
    tasks, libraries = options.pop("tasks").split(","), options.pop("libraries").split(",")
    for given, known in ((tasks, TASKS), (libraries, LIBRARIES)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: allowed are {', '.join(known)}")
    environments, path, rounds = options.pop("environments"), options.pop("json"), options.pop("rounds")
    torch.set_num_threads(options["threads"])
    results = {}
    for task in tasks:
        results[task] = compare(task, libraries, options | TASKS[task], rounds, environments.absolute())
        print(table(task, results[task]), end="\n\n", flush=True)
        if path is not None:
            path.write_text(json.dumps({"options": options, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
