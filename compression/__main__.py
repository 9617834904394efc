"""Command line: write a compressed model, convert one to another format, or list methods and formats.

python -m compression nf4 --base reference --out nf4-model
python -m compression "rtn(symmetric=true)" --out rtn-model --format gptq
python -m compression convert rtn-model served --engine vllm
python -m compression list
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import compression
from compression import CompressionError, Recipe, WorkerError, checkpoints, engine, workers
from compression.checkpoints.base import MANIFEST
from compression.checkpoints.formats import registry as formats
from compression.cluster.channel import bound
from compression.commands import convert, listing, on_cluster, progress
from compression.files.strict_json import path_option
from compression.files.terminal import reader_may_leave, terminal
from compression.workers import Workers

OWN = formats.OWN

if TYPE_CHECKING:
    from compression import Compressed, Plan


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 on success, 2 for input that cannot be, with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m compression", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help='a recipe such as nf4 or "rtn(bits=3)", or the word list or convert')
    parser.add_argument("folders", nargs="*", type=path_option, help="of convert: the checkpoint, and the new folder")
    parser.add_argument("--base", default="reference", help="reference, smollm2, random:<shape>, a folder, a GGUF file "
                        "or a hub id")  # fmt: skip
    parser.add_argument("--dequantize", action="store_true", help="allow a base that is quantized already, in a "
                        "published format: begin with the dense weights that it stands for")  # fmt: skip
    parser.add_argument("--out", type=path_option, help="folder for the compressed model: a new one, or that of an "
                        "interrupted run, which is then resumed")  # fmt: skip
    parser.add_argument("--format", choices=formats.names(), help="of what is written, exactly or not at all; default "
                        "own; python -m compression list --formats tells what each holds")  # fmt: skip
    parser.add_argument("--engine", choices=formats.ENGINES, help="of convert: take the first format that this "
                        "engine opens")  # fmt: skip
    parser.add_argument("--formats", action="store_true", help="of list: which formats hold what each method "
                        "stores, and which engines open it there")  # fmt: skip
    parser.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N; default cuda if available")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", help="calibration text: embedded, hub, random or a folder; "
                        "default embedded for the reference, random for random weights")  # fmt: skip
    parser.add_argument("--downstream", metavar="TASK", help="training task of recover: a task of the embedded "
                        "reference or a folder of *.jsonl with prompt and answer; default arithmetic for the "
                        "reference")  # fmt: skip
    parser.add_argument("--teacher", help="teacher for distillation: a base, or self for the uncompressed "
                        "base; default reference-teacher for the reference")  # fmt: skip
    parser.add_argument("--cache", type=path_option, help="folder of cached training results; default "
                        "$COMPRESSION_CACHE, or compression-bench in the user's cache folder")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--ray", metavar="ADDRESS", help="compress on a node of a Ray cluster: its HOST:PORT, or "
                        "auto for that of $RAY_ADDRESS, else one that is started here; --out is on a disk of "
                        "both")  # fmt: skip
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    bound()
    try:
        _check_command(options)
        if options.recipe == "list":
            return listing.list_formats(options) if options.formats else listing.list_methods(options)
        return convert.convert(options) if options.recipe == "convert" else _compress(options, arguments)
    except CompressionError as error:
        if workers.is_first() or isinstance(error, WorkerError):  # what else ends one process, all have in common
            print(terminal(f"error: {error}"), file=sys.stderr)
        return 2


def _check_command(options: argparse.Namespace) -> None:
    """Refuse what another command would have read, and several processes for what is not shared out."""
    if options.recipe in ("list", "convert") and workers.started() > 1:
        raise CompressionError(f"python -m compression {options.recipe} is not shared out; start one process, without "
                          "torchrun")  # fmt: skip
    of = {"folders": "convert", "engine": "convert", "formats": "list"}
    for name, command in of.items():
        if getattr(options, name) and options.recipe != command:
            what = " ".join(map(str, options.folders)) if name == "folders" else f"--{name}"
            raise CompressionError(f"{what} belongs to python -m compression {command}; the command is "
                                   f"{options.recipe}")  # fmt: skip
    if options.ray and options.recipe in ("list", "convert"):
        raise CompressionError(f"--ray belongs to compressing; the command is {options.recipe}")


def _compress(options: argparse.Namespace, arguments: list[str]) -> int:
    options.format = options.format or OWN
    recipe = Recipe.parse(options.recipe)
    if options.out is None:
        raise CompressionError("--out DIR is missing: the folder to write the compressed model to")
    if options.ray:
        return on_cluster.compress(options, arguments)
    with workers.joined(options.device) as (group, device):
        base = group.first(lambda: compression.locate(options.base))
        result = _write(recipe, options, device, group)
    if group.rank == 0:
        _report(recipe, base.label, options, device, result)
    return 0


def _report(recipe: Recipe, base: str, options: argparse.Namespace, device: str, result: "Compressed") -> None:
    """Print what became of the model."""
    stored = convert.bytes_of(options.out)
    facts = {
        "recipe": recipe.text,
        "base": base,
        "executed": list(result.executed),
        "folder": str(options.out),
        "format": options.format,
        "stored_bytes": stored,
        "bits_per_parameter": 8 * stored / result.parameters,
        "seconds": result.cost.seconds if result.cost else None,
        "peak_bytes": result.cost.peak_bytes if result.cost else None,
        "calibration_tokens": result.cost.calibration_tokens if result.cost else 0,
        "trained_tokens": result.cost.trained_tokens if result.cost else 0,
        "trained_parameters": result.cost.trained_parameters if result.cost else 0,
        "kernels": result.kernels(device),
        "notes": [*result.notes, *([] if options.format == OWN else formats.find(options.format).served(result.model))],
        "layers": [f"{entry.name}: {entry.outcome}, {entry.detail}" for entry in result.report],
    }
    if options.json:
        print(json.dumps(facts, indent=1))
        return
    for line in facts.pop("layers"):
        print(terminal(line))
    for key, value in facts.items():  # last: what is looked for stands at the end, however many layers there are
        for line in value if key == "notes" else [f"{key}: {value}"]:
            print(terminal(line))


def _write(recipe: Recipe, options: argparse.Namespace, device: str, group: Workers) -> "Compressed":
    """Compress block by block where that can be; what is returned may be without weights."""
    planned = partial(
        compression.plan, options.base, recipe, calibration=options.calibration, teacher=options.teacher,
        downstream=options.downstream,
    )  # fmt: skip
    streams = not any(step.method.unit in ("model", "training") for step in recipe.steps)
    if options.format != OWN and (_beside(options.out) / MANIFEST).exists():  # of a run that was killed behind it
        raise CompressionError(f"{_beside(options.out)} holds a result already: python -m compression convert "
                               f"{_beside(options.out)} {options.out} --format {options.format} writes it, or goes on "
                               "writing; or delete it")  # fmt: skip
    if options.format != OWN or not streams:
        group.first(lambda: checkpoints.output.check_writable(options.out))
    if streams:
        return _stream(planned, options, device, group)
    settled = engine.same_run.planned_together(group, planned)
    if options.format != OWN:
        settled.check_format(options.format)
    resumed = "training is resumed" if settled.trains else "nothing can be resumed"
    print(f"{settled.whole_model}: the model is held in memory, and {resumed}", file=sys.stderr)
    result = compression.compress(
        options.base, settled, cache=options.cache, device=device, seed=options.seed,
        progress=progress.bar("compressing"), dequantize=options.dequantize,
    )  # fmt: skip
    result.save(options.out, options.format)
    return result


def _stream(planned: "Callable[[], Plan]", options: argparse.Namespace, device: str, group: Workers) -> "Compressed":
    """Write a folder block by block, and in a published format from that."""
    folder = options.out if options.format == OWN else _beside(options.out)
    group.first(partial(_check_folder, folder))
    settled = engine.same_run.planned_together(group, planned)
    if options.format != OWN:
        settled.check_format(options.format)
    result = compression.compress(
        options.base, settled, into=folder, device=device, seed=options.seed, workers=group,
        dequantize=options.dequantize,
        progress=progress.bar("compressing") if group.rank == 0 else None,
    )  # fmt: skip
    if options.format != OWN and group.rank == 0:
        try:
            opened = checkpoints.opening.open_unread(str(folder))
            engine.conversion.convert(opened, options.out, options.format, progress.bar("converting"))
        except CompressionError as error:
            raise CompressionError(f"{error}; in the format of this package it is in {folder}") from error
        shutil.rmtree(folder)
    return result


def _beside(folder: Path) -> Path:
    """Where the result lies in our own format until it is written in another one."""
    return folder.with_name(f"{folder.name}.{OWN}")


def _check_folder(folder: Path) -> None:
    """Say that the run in a folder goes on, or see that one can begin there."""
    if (done := engine.stream_state.unfinished(folder)) is not None:
        print(terminal(f"{folder} is not finished: {done} blocks are done; resuming after them"), file=sys.stderr)
    else:
        checkpoints.output.check_writable(folder)


if __name__ == "__main__":
    with reader_may_leave():
        sys.exit(main())
