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
from collections.abc import Callable
from pathlib import Path

from torch import nn

from compression import devices
from compression.architectures import decoder, embeddings, published
from compression.architectures.anatomy import Architecture
from compression.architectures.skeleton import renew_tables
from compression.architectures.table import architecture_of
from compression.caches import replaying
from compression.checkpoints import base
from compression.checkpoints import weights as _weights
from compression.checkpoints.artefact import Compressed
from compression.checkpoints.base import MANIFEST
from compression.checkpoints.opening import outline
from compression.checkpoints.output import check_writable
from compression.checkpoints.weights import Weights
from compression.cost import Cost, CostMeter
from compression.engine import shards
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
from compression.engine.shapes import policy_of
from compression.engine.shards import Shards
from compression.engine.stream_state import unfinished
from compression.errors import RecipeError
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
    dequantize: bool = False,
) -> Compressed:
    """Run a plan and write the result, holding one block at a time; `compression.load` opens it.

    The tensors and the report are those of `compress(base, recipe, ...).save(folder)`. If `folder` holds what such a
    call left, this one resumes from there. Whether the folder can be written to is known before anything is planned.

    Args:
        folder: a new or an empty one, or one that such a call left; a link to one, or a mount point.
        planned: makes the plan.
        device: where blocks are compressed.
        seed: as for `compress`.
        progress: called with (blocks done, blocks, what), first with those that an interrupted call did.
        workers: the processes of the run, each of which makes this call. The first alone reads and writes the folder.
        dequantize: as for `compress`.

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
    base.refuse_compressed(plan.source, published=dequantize)
    skeleton = decoder.without_weights(plan.base)
    skeleton.generation_config = plan.source.generation_config
    weights = plan.source.weights(device, seed)
    _weights.fit(skeleton, weights.headers, where=weights.where)
    passes = make_passes(make_contexts(plan, device, seed, progress, workers), skeleton)
    blocks = len(decoder.decoder_blocks(skeleton))
    known = {"command": "compress", **identity(plan, seed, device, [each.context for each in passes])}
    workers.check_same({**known, "output folder": str(folder)})
    with shards.written(target, known, blocks, workers) as output:
        if plan.schedule:
            choose.warm_up(device)
        with devices.repeatable(device), CostMeter(device) as meter:
            run = _Run(output, lambda done: progress(done, blocks, plan.recipe.text))
            run.take_all(skeleton, weights, passes, meter)
        result = _result(plan, skeleton, passes, output.state.cost)
        manifest = result.manifest(output.state.layers, sorted(output.folder.files))
        output.finish(result, plan.source.tokenizer, {MANIFEST: manifest}, dtype=weights.dtype,
                      packed=result.stored or bool(output.state.layers), last=MANIFEST)  # fmt: skip
    return outline(Path(folder)) if workers.rank == 0 else result


def _result(plan: Plan, skeleton: nn.Module, passes: list[Pass], cost: Cost) -> Compressed:
    """What the folder holds, its model without weights."""
    replaying.attach(skeleton, policy_of(plan.schedule))
    return Compressed(
        model=skeleton, recipe=plan.recipe, base=(plan.source.label, plan.source.digest), cost=cost,
        executed=plan.executed, folder=plan.source.folder,
        report=full_report((entry for each in passes for entry in each.context.report), skeleton),
        notes=tuple(note for each in passes for note in notes_of(each.context, skeleton)),
    )  # fmt: skip


class _Run:
    """Writes blocks in order into a folder; every process knows what is in it."""

    def __init__(self, output: Shards, progress: Callable[[int], None]):
        self.output, self.folder, self.state, self.progress = output, output.folder, output.state, progress

    def enter(self, skeleton: nn.Module, weights: Weights, passes: list[Pass]) -> None:
        """Write what is outside the blocks, unless it is, and take the passes to where they stopped."""
        done = self.state.done
        for each, report in zip(passes, self.state.reports, strict=False):
            each.context.report[:] = report
        name = self.output.name(0)
        if name in self.folder.files and not any(each.ids is not None and done <= each.last for each in passes):
            return
        model, fresh = _outside(skeleton, weights), name not in self.folder.files
        for number, each in enumerate(passes):
            stored = self.folder.path / _inputs(done, number)
            hidden = None
            if stored.name in self.folder.files and self.output.workers.rank == 0:
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
            self.output.write(name, published.together(outside, row, skeleton.config))
            stored = decoder.stored_layers(model)
            self.state.layers |= {key: describe(stored[key]) for key in stored if not row.inside(key)}
            self.state.reports = [each.context.report for each in passes]
            self.output.commit()

    def take_all(self, skeleton: nn.Module, weights: Weights, passes: list[Pass], meter: CostMeter) -> None:
        """Write what is missing, block by block."""
        before = self.state.cost
        self.enter(skeleton, weights, passes)
        self.progress(self.state.done)
        while self.state.done < self.output.blocks:
            self.take(skeleton, weights, passes)
            self.state.cost = before.then(meter.cost(sum(each.context.calibration_tokens for each in passes)))
            self.output.commit()
            self.progress(self.state.done)

    def take(self, skeleton: nn.Module, weights: Weights, passes: list[Pass]) -> None:
        """Compress and write the next block, and what reaches the one behind it; the caller commits that."""
        at = self.state.done
        block = _load(decoder.decoder_blocks(skeleton)[at], weights)
        for each in passes:
            each.take(at, block)
        stored, tensors = decoder.stored_layers(block.module), block.module.state_dict(prefix=f"{block.name}.")
        if not stored:
            tensors = published.together(tensors, block.row, skeleton.config)
        self.output.write(self.output.name(at + 1), tensors)
        self.state.layers |= {f"{block.name}.{name}": describe(layer) for name, layer in stored.items()}
        for number, each in enumerate(passes):
            if each.inputs is not None:
                hidden = {str(i): states for i, states in enumerate(each.inputs.gathered())}
                self.output.write(_inputs(at + 1, number), hidden)
        self.folder.drop(_inputs(at, number) for number in range(len(passes)))
        self.state.reports = [each.context.report for each in passes]
        self.state.done = at + 1


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
