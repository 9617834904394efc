"""Compressing into a folder block by block: memory holds one block and its inputs, and a killed run resumes.

Until it is finished a folder holds

    compression.state.json              the seal: of which run it is, and what is done (`files.sealed_folder`)
    model-00001-of-00033.safetensors    everything outside the blocks; then one file to a block, as each is done
    inputs-5-0.safetensors              what reaches block 5, for each step that reads inputs

and afterwards what `Compressed.save` writes, with an index of its files if the model is dense. A run that finds a state
resumes after the last block that it names; a state of another base, recipe, seed, calibration text or code is refused.

What reaches the next block is stored, not computed again from the finished ones: that would take as many forward passes
as there are finished blocks, where reading samples x tokens x hidden size numbers (1 GB for 128 x 512 tokens of a 7B
model) takes seconds. Writing them costs each block the same, which is little beside its calibration.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from compression import devices
from compression.architectures import decoder, embeddings, published
from compression.architectures.anatomy import Architecture
from compression.architectures.skeleton import renew_tables
from compression.architectures.table import architecture_of
from compression.checkpoints import base
from compression.checkpoints import weights as _weights
from compression.checkpoints.artefact import STATE, Compressed, outline
from compression.checkpoints.base import MANIFEST
from compression.checkpoints.output import check_writable, write_beside
from compression.checkpoints.side_files import read_generation_config
from compression.checkpoints.weight_files import INDEX
from compression.checkpoints.weights import Weights
from compression.cost import CostMeter
from compression.engine.passes import (
    Pass,
    Progress,
    around_blocks,
    full_report,
    make_contexts,
    make_passes,
    notes_of,
)
from compression.engine.plan import Plan
from compression.engine.same_run import identity, planned_together
from compression.engine.stream_state import SEAL, State, unfinished
from compression.errors import CheckpointError, RecipeError
from compression.files.atomic import sync, write_json
from compression.files.sealed_folder import SealedFolder
from compression.layers.kernels import choose
from compression.layers.stored import describe
from compression.workers import ALONE, Workers


def stream(
    folder: str | Path,
    planned: Callable[[], Plan],
    *,
    device: str,
    seed: int,
    progress: Progress | None,
    workers: Workers = ALONE,
) -> Compressed:
    """Run a plan and write the result, holding one block at a time; `compression.load` opens it.

    The tensors and the report are those of `compress(base, recipe, ...).save(folder)`. If `folder` holds what an
    interrupted call with the same arguments left, this one resumes from there. Whether the folder can be written to is
    known before anything is planned.

    Args:
        folder: a new or an empty one, or one that such a call left; a link to one, or a mount point.
        planned: makes the plan.
        device: where blocks are compressed.
        seed: as for `compress`.
        progress: called with (blocks done, blocks, what), first with those that an interrupted call did.
        workers: the processes of the run, each of which makes this call. The first alone reads and writes the folder.

    Returns:
        The result, its model without weights; on other processes than the first it names no folder.

    Raises:
        RecipeError: a step needs the whole model at once.
        CheckpointError: the base cannot be opened or the folder not be written; the folder holds something else, or
            what a call with other arguments left.
        LayerError, CalibrationError, BackendError: as `compress`.
        WorkerError: processes differ, or one is gone.
    """
    target, progress = Path(folder), progress or (lambda done, total, what: None)
    target = workers.first(lambda: target if unfinished(target) is not None else check_writable(target))
    plan = planned_together(workers, planned)
    if reason := plan.whole_model:
        raise RecipeError(f"{plan.recipe.text} cannot be compressed block by block: {reason}; take "
                          "compress(...).save(...)")  # fmt: skip
    base.refuse_compressed(plan.source)
    skeleton = decoder.without_weights(plan.base)
    skeleton.generation_config = read_generation_config(plan.source.folder)
    weights = _weights.open_weights(plan.source, device, seed)
    _weights.fit(skeleton, weights.headers, where=weights.where)
    passes = make_passes(make_contexts(plan, device, seed, progress, workers), skeleton)
    known = identity(plan, seed, device, [each.context for each in passes])
    workers.check_same({**known, "output folder": str(folder)})
    with _written(target, known, workers) as output:
        if plan.schedule:
            choose.warm_up(device)
        with devices.repeatable(device), CostMeter(device) as meter:
            output.run(skeleton, weights, passes, meter, lambda done, total: progress(done, total, plan.recipe.text))
        result = Compressed(
            model=skeleton, recipe=plan.recipe, base=(plan.source.label, plan.source.digest), cost=output.state.cost,
            executed=plan.executed, folder=plan.source.folder,
            report=full_report((entry for each in passes for entry in each.context.report), skeleton),
            notes=tuple(note for each in passes for note in notes_of(each.context, skeleton)),
        )  # fmt: skip
        output.finish(result, weights.dtype, plan.source.tokenizer)
    return outline(Path(folder)) if workers.rank == 0 else result


@contextmanager
def _written(target: Path, identity: dict[str, Any], workers: Workers) -> Iterator["_Output"]:
    """The folder with its state, the first of these processes alone writing to it.

    Raises:
        CheckpointError: the state is of another run or names files that are not what they were, another process writes
            here, or something cannot be written.
    """
    with ExitStack() as held:

        def claimed() -> SealedFolder:
            try:
                if not (target / STATE).exists():
                    with SealedFolder.whole(target, SEAL, identity) as begun:
                        begun.facts = dataclasses.asdict(State())
            except OSError as error:
                raise CheckpointError(f"output folder {target} cannot be written: {error}") from error
            busy = f"another process is writing to {target}"
            return held.enter_context(SealedFolder.claim(target, SEAL, identity, busy))

        yield _Output(workers.first(claimed), workers)


class _Output:
    """A folder that blocks are written to, in order; every process knows what is in it, the first one touches it."""

    def __init__(self, folder: SealedFolder, workers: Workers):
        self.folder, self.workers, self.state = folder, workers, State.of(folder)

    def enter(self, skeleton: nn.Module, weights: Weights, passes: list[Pass]) -> None:
        """Write what is outside the blocks, unless it is, and take the passes to where they stopped."""
        done = self.state.done
        missing = [name for name in (_shard(skeleton, i + 1) for i in range(done)) if name not in self.folder.files]
        if missing or done > len(decoder.decoder_blocks(skeleton)):
            wrong = ValueError(f"{done} blocks are done, of which it names no file {', '.join(missing[:3])}")
            raise self.folder.damaged(wrong)
        for each, report in zip(passes, self.state.reports, strict=False):
            each.context.report[:] = report
        name = _shard(skeleton, 0)
        if name in self.folder.files and not any(each.ids is not None and done <= each.last for each in passes):
            return
        model, fresh = _outside(skeleton, weights), name not in self.folder.files
        for number, each in enumerate(passes):
            stored = self.folder.path / _inputs(done, number)
            hidden = None
            if stored.name in self.folder.files and self.workers.rank == 0:
                tensors = _weights.read_tensors([stored])
                hidden = [tensors[str(i)].to(each.context.device) for i in range(len(tensors))]
            each.enter(model, done, hidden)
            around = around_blocks(each.step, model)
            each.context.report += around if fresh else []
        if fresh:
            row = architecture_of(model)
            tied = {row.head_weight} if embeddings.tied(model) else set()
            outside = {key: tensor for key, tensor in model.state_dict().items()
                       if key not in tied and not row.inside(key)}  # fmt: skip
            self._write(name, published.together(outside, row, skeleton.config))
            stored = decoder.stored_layers(model)
            self.state.layers |= {key: describe(stored[key]) for key in stored if not row.inside(key)}
            self.state.reports = [each.context.report for each in passes]
            self.commit()

    def run(
        self,
        skeleton: nn.Module,
        weights: Weights,
        passes: list[Pass],
        meter: CostMeter,
        progress: Callable[[int, int], None],
    ) -> None:
        """Write what is missing, block by block."""
        before, total = self.state.cost, len(decoder.decoder_blocks(skeleton))
        self.enter(skeleton, weights, passes)
        progress(self.state.done, total)
        while self.state.done < total:
            self.take(skeleton, weights, passes)
            self.state.cost = before.then(meter.cost(sum(each.context.calibration_tokens for each in passes)))
            self.commit()
            progress(self.state.done, total)

    def take(self, skeleton: nn.Module, weights: Weights, passes: list[Pass]) -> None:
        """Compress and write the next block, and what reaches the one behind it; `commit` is up to the caller."""
        at = self.state.done
        block = _load(decoder.decoder_blocks(skeleton)[at], weights)
        for each in passes:
            each.take(at, block)
        stored, tensors = decoder.stored_layers(block.module), block.module.state_dict(prefix=f"{block.name}.")
        if not stored:
            tensors = published.together(tensors, block.row, skeleton.config)
        self._write(_shard(skeleton, at + 1), tensors)
        self.state.layers |= {f"{block.name}.{name}": describe(layer) for name, layer in stored.items()}
        for number, each in enumerate(passes):
            if each.inputs is not None:
                hidden = {str(i): states for i, states in enumerate(each.inputs.gathered())}
                self._write(_inputs(at + 1, number), hidden)
        self.folder.drop(_inputs(at, number) for number in range(len(passes)))
        self.state.reports = [each.context.report for each in passes]
        self.state.done = at + 1

    def commit(self) -> None:
        """Put the state on disk, then delete what it does not count on any more."""

        def write() -> None:
            with self._said(STATE):
                self.folder.commit(**dataclasses.asdict(self.state))
                self.folder.sweep("inputs-*.safetensors")

        self.workers.first(write)

    def finish(self, result: Compressed, dtype: torch.dtype, tokenizer: Any) -> None:
        """Write what stands beside the tensors; compression.json is the last, and makes the folder one to load."""
        self.workers.first(lambda: self._finish(result, dtype, tokenizer))

    def _finish(self, result: Compressed, dtype: torch.dtype, tokenizer: Any) -> None:
        path, files, packed = self.folder.path, sorted(self.folder.files), bool(self.state.layers)
        if not packed:
            places, headers = _weights.index(path / name for name in files)
            size = sum(header.nbytes for header in headers.values())
            weight_map = {name: place.name for name, place in sorted(places.items())}
            with self._said(INDEX):
                write_json(path / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        write_beside(path, result, dtype, tokenizer, {}, packed=packed)
        with self._said(MANIFEST):
            for each in path.rglob("*"):
                sync(each)
            write_json(path / MANIFEST, result.manifest(self.state.layers, files))
            (path / STATE).unlink()

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        def write() -> None:
            with self._said(name), self.folder.writing(name) as temporary:
                on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
                save_file(on_cpu, temporary, metadata={"format": "pt"})

        self.workers.first(write)

    @contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """Errors of the disk in words."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder.path / name} cannot be written: {error}; what is finished stays, {self.state.done} "
                "blocks now, and the same command goes on from there"
            ) from error


def _shard(skeleton: nn.Module, number: int) -> str:
    """File 0 is what is outside the blocks, file i + 1 block i; named as transformers names them, from 1."""
    count = len(decoder.decoder_blocks(skeleton)) + 1
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _inputs(at: int, number: int) -> str:
    return f"inputs-{at}-{number}.safetensors"


def _outer(weights: Weights, row: Architecture) -> list[str]:
    return [name for name in weights.headers if not row.inside(name)]


def _outside(skeleton: nn.Module, weights: Weights) -> nn.Module:
    """The model with blocks that have no weights."""
    model = copy.deepcopy(skeleton)
    _weights.assign(model, weights.read(_outer(weights, architecture_of(model))), where=weights.where)
    model.tie_weights()
    renew_tables(model)
    return model.eval().requires_grad_(False)


def _load(blank: decoder.Block, weights: Weights) -> decoder.Block:
    """A block with its weights; `blank` stays without."""
    prefix, module = f"{blank.name}.", copy.deepcopy(blank.module)
    tensors = weights.read(f"{prefix}{name}" for name in module.state_dict())
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, assign=True)
    return dataclasses.replace(blank, module=module.eval().requires_grad_(False))
