"""The runner: takes a base through the steps of a recipe."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compression import devices
from compression.architectures import decoder
from compression.calibration.text import Calibration, open_calibration
from compression.checkpoints import base as _checkpoint
from compression.checkpoints.artefact import LEFT_ALONE, Compressed, LayerReport
from compression.checkpoints.base import Base
from compression.cost import Cost, CostMeter
from compression.engine.kept_steps import StepCache
from compression.engine.plan import (
    check,
    check_source,
    find_calibration,
    find_downstream,
    find_teacher,
    thin_calibration,
)
from compression.engine.schedule import is_whole, make_schedule
from compression.errors import CheckpointError, RecipeError
from compression.files.atomic import code_digest, digest_of
from compression.files.strict_json import expanded
from compression.layers import embedding
from compression.layers.kernels import choose
from compression.recipes.recipe import Recipe, Step
from compression.training.downstream import Downstream, open_downstream

Progress = Callable[[int, int, str], None]


@dataclass
class Context:
    """What a method may use while it runs.

    Attributes:
        step: the step that runs, with its settings per layer; None where stored layers are made dense.
        device: where the model is.
        seed: for everything random; methods make generators of their own from it.
        progress: called with (done, total, what).
        report: methods add one entry per layer.
        ids: token ids of calibration text, int64 (samples, length), on the device; None for a step that reads none.
        tokenizer: of the base; None if it has none.
        teacher: the base that a step learns from; None for a step that needs none.
        folder: where training keeps what later runs and those that go on after a kill can use.
        downstream: the task whose examples a step trains on; None for a step that trains on none.
        pruned: whether a step before made zeros, which are to stay.
        trained: runs of training that the step took; what they left in the folder is of no use once its result is kept.
    """

    step: Step | None
    device: str
    seed: int
    progress: Progress
    report: list[LayerReport] = field(default_factory=list)
    ids: Tensor | None = None
    tokenizer: Any = None
    teacher: _checkpoint.BaseSource | None = None
    folder: Path | None = None
    downstream: Downstream | None = None
    pruned: bool = False
    trained: list[Any] = field(default_factory=list)

    @property
    def calibration_tokens(self) -> int:
        """Tokens of calibration text that were read."""
        return 0 if self.ids is None else self.ids.numel()


def compress(
    base: Base | str,
    recipe: Recipe | str,
    *,
    device: str | None = None,
    seed: int = 0,
    calibration: Any = None,
    downstream: Any = None,
    teacher: str | _checkpoint.BaseSource | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Apply a recipe to a base; the base's own model is left as it was.

    Args:
        base: an opened base, or its text (opened on `device`, default "cpu").
        recipe: an instance or its text.
        calibration: text for methods that need some: "embedded", "hub", "random", a folder, texts, or token ids
            (samples, length), see `calibration.text`. None is the default of the base: the embedded text for
            the reference, random ids for random weights, none for others.
        downstream: the task that methods recover on: one of the embedded reference by name, a folder, or (prompt,
            answer) pairs, see `training.downstream`. None is "arithmetic" for the reference, none for others.
        teacher: the text of a base for methods that learn from one, or "self" for the uncompressed base; None is the
            default of the base: `reference-teacher` for the reference, none for others.
        cache: the folder in which training keeps what later runs can use, or a `StepCache`; None is
            `files.atomic.cache_folder()`. A recipe that trains begins behind the steps whose result is there.
        progress: called with (done, total, what) as blocks are done.

    Raises:
        RecipeError: the recipe cannot be.
        CheckpointError: the base cannot be opened, or what a cache holds is damaged.
        LayerError: a layer cannot be taken; raised before any layer is touched where its shape is the reason.
        CalibrationError: a method needs calibration text, and there is none, too little, or none that can be read.
        TeacherError: a method needs a teacher, and there is none, or it does not fit.
        TrainingError: training had to stop.
        BackendError: a library that the recipe asks for is not there.
    """
    recipe = Recipe.parse(recipe)
    store = cache if isinstance(cache, StepCache) else StepCache(expanded(cache, CheckpointError) if cache else None)
    keeps = store.folder if any(step.method.trains for step in recipe.steps) else None
    if isinstance(base, str):
        source = _checkpoint.locate(base).fetch()
        calibration, downstream = open_calibration(calibration, source), open_downstream(downstream, source)
        check_source([recipe], source, calibration, teacher, downstream)
        base = _checkpoint.open_base(source, device or "cpu", seed=seed)
    elif device not in (None, base.device):
        raise RecipeError(f"the base is on {base.device!r}; open it on {device!r} instead")
    else:
        check(recipe, base.model)
    text = find_calibration([recipe], base.source, calibration)
    task = find_downstream([recipe], base.source, downstream)
    taught_by = find_teacher([recipe], base.source, teacher)
    schedule = make_schedule(recipe.steps)
    model = decoder.copy_sharing_tensors(base.model)  # methods replace modules and never write into a base's tensors
    contexts = make_contexts(schedule, model, base.source, text, base.device, seed, progress)
    pruned = False
    for context in contexts:
        context.teacher, context.folder, context.pruned = taught_by, keeps, pruned
        pruned = pruned or (context.step is not None and context.step.method.info.leaves == "sparse")
        context.downstream = task if context.step is not None and context.step.method.downstream else None
    identities = _identities(schedule, contexts, base, store)
    begin, kept = store.find(identities, base.device)
    report, seconds, notes = ([], [], []) if kept is None else (
        list(kept.report), list(kept.seconds), list(kept.notes)
    )  # fmt: skip
    model = model if kept is None else kept.model
    if begin < len(schedule):
        choose.warm_up(base.device)

    def result(steps: int) -> Compressed:
        before = Cost(seconds=0, peak_bytes=0) if kept is None or kept.cost is None else kept.cost
        trained = [run for context in contexts[:steps] for run in context.trained]
        cost = dataclasses.replace(
            before.then(meter.cost(sum(context.calibration_tokens for context in contexts[:steps]))),
            seconds=sum(seconds), trained_tokens=before.trained_tokens + sum(run.tokens for run in trained),
            trained_parameters=max(before.trained_parameters, *(run.parameters for run in trained), 0),
        )  # fmt: skip
        return Compressed(
            model=model.eval().requires_grad_(False), recipe=recipe, base=(base.text, base.digest),
            executed=tuple(what for _, what in schedule[:steps]), report=tuple(report), seconds=tuple(seconds),
            notes=tuple(notes), cost=cost, tokenizer_source=lambda: base.tokenizer, folder=base.source.folder,
        )  # fmt: skip

    with devices.repeatable(base.device), CostMeter(base.device) as meter:
        for done in range(begin, len(schedule)):
            meter.lap()
            notes += notes_of(contexts[done], model)
            model = _take(contexts[done], model, recipe.text)
            seconds.append(meter.lap())
            report += contexts[done].report
            if (identity := identities[done]) is not None:
                store.put(identity, result(done + 1))
                for run in contexts[done].trained:
                    shutil.rmtree(run.folder, ignore_errors=True)
    report[:] = full_report(report)
    return result(len(schedule))


def notes_of(context: Context, model: nn.Module) -> list[str]:
    """What a reader of the result has to know of a step, as sentences; `model` is what the step takes."""
    if context.step is None:
        return []
    return list(filter(None, [thin_calibration(context.step, model, context.calibration_tokens)]))


def _take(context: Context, model: nn.Module, what: str) -> nn.Module:
    """The model after one step of a schedule."""
    step = context.step
    if step is not None and is_whole(step):
        return step.method.apply(model, context)  # type: ignore[attr-defined]
    [each] = make_passes([context], model)
    each.enter(model)
    context.report += around_blocks(step, model)
    blocks = decoder.decoder_blocks(model)
    for i, block in enumerate(blocks):
        each.take(i, block)
        context.progress(i + 1, len(blocks), what)
    return model


def around_blocks(step: Step | None, model: nn.Module) -> list[LayerReport]:
    """Take a step to embeddings and head, behind what it reads of them; the report of that."""
    if step is None:
        embedding.unpack(model)
    elif getattr(step.method, "embeddings", 16) == 8:
        embedding.pack(model)
        layers = {name: model.get_submodule(name) for name in (embedding.EMBEDDINGS, embedding.HEAD)}
        return [
            LayerReport(name, "replaced", f"{step}, {embedding.GRID.words}, kernel {layer.kernel_name()}")  # type: ignore[operator]
            for name, layer in layers.items()
        ]
    return []


def _identities(
    schedule: Sequence[tuple[Step | None, str]], contexts: Sequence[Context], base: Base, store: StepCache
) -> list[dict[str, Any] | None]:
    """What the result of the first 1, 2, ... steps depends on; None for results that are not kept."""
    found: list[dict[str, Any] | None] = []
    taken, trains = [], False
    for (step, what), context in zip(schedule, contexts, strict=True):
        text = None if context.ids is None else digest_of(context.ids)
        taken.append([what, text if context.downstream is None else context.downstream.digest])
        trains = trains or (step is not None and step.method.trains)
        if step is None or not (trains or store.keep([what for what, _ in taken])):
            found.append(None)
            continue
        cuda = base.device.startswith("cuda")
        found.append({
            "base": base.digest,
            "dtype": str(next(base.model.parameters()).dtype),
            "steps": list(taken),
            "teacher": None if context.teacher is None or not trains else context.teacher.digest,
            "seeds": [base.seed if base.source.kind == "random" else None, context.seed],
            "device": torch.cuda.get_device_name(base.device) if cuda else "cpu",
            "threads": None if cuda else torch.get_num_threads(),
            "version of torch": torch.__version__,
            "version of transformers": transformers.__version__,
            "code of this package": code_digest(),
        })  # fmt: skip
    return found


@dataclass
class Pass:
    """One step of a schedule on its way through the blocks, which it takes in order.

    All steps can take a block before any takes the next: what a step makes of a block depends on what it made of those
    before, and on what the steps before it made of this one.

    Attributes:
        step: None makes stored layers dense again.
        context: of the step; holds the report.
        last: index of the last block that the step changes: to those behind it, inputs are of no use.
        inputs: what reaches the next block, from `enter` on and until the last block.
    """

    step: Step | None
    context: Context
    last: int
    inputs: decoder.Inputs | None = None

    @property
    def ids(self) -> Tensor | None:
        """Token ids (samples, length) for a step that reads inputs."""
        return self.context.ids

    def enter(self, model: nn.Module, at: int = 0, hidden: list[Tensor] | None = None) -> None:
        """Stand before block `at`, with the hidden states that reached it; at the first, they come from the text."""
        if self.ids is not None and at <= self.last:
            self.inputs = (
                decoder.Inputs.of_first_block(model, self.ids)
                if hidden is None
                else decoder.Inputs.of_block(at, hidden, model, self.ids)
            )

    def take(self, index: int, block: decoder.Block) -> None:
        """Compress block number `index`."""
        if self.step is None:
            decoder.make_dense(block.module)
        elif _changes(self.step, block):
            self.step.method.compress_block(block, self.inputs, self.context)  # type: ignore[attr-defined]
        else:
            self.context.report += [LayerReport(name, "kept", LEFT_ALONE) for name, _ in block.linears()]
        if index >= self.last:
            self.inputs = None
        elif self.inputs is not None:
            self.inputs.advance(block)


def make_contexts(
    schedule: Iterable[tuple[Step | None, str]],
    model: nn.Module,
    source: _checkpoint.BaseSource,
    calibration: Calibration | None,
    device: str,
    seed: int,
    progress: Progress | None,
) -> list[Context]:
    """A context for each step of a schedule; the calibration text of those that need some is read.

    Raises:
        CalibrationError: there is too little of it.
    """
    contexts = [Context(step, device, seed, progress or _silent, tokenizer=source.tokenizer) for step, _ in schedule]
    for context in contexts:
        if context.step is not None and context.step.method.calibration is not None:
            assert calibration is not None  # find_calibration has refused
            method = context.step.method
            samples, length = method.calibration
            context.ids = calibration.tokens(
                source.tokenizer, samples=samples, length=length, seed=seed, vocabulary=model.config.vocab_size,  # type: ignore[union-attr]
                ended=method.trains,
            ).to(device)  # fmt: skip
    return contexts


def make_passes(contexts: Iterable[Context], model: nn.Module) -> list[Pass]:
    """Passes of block methods over a model, whose weights are not looked at."""
    passes, blocks = [], decoder.decoder_blocks(model)
    for context in contexts:
        step = context.step
        last = max((i for i, block in enumerate(blocks) if step is None or _changes(step, block)), default=-1)
        passes.append(Pass(step, context, last))
    return passes


def full_report(report: Iterable[LayerReport]) -> tuple[LayerReport, ...]:
    """What the steps reported, and the parts of the model that none of them took."""
    report = list(report)
    if report:
        reported = {entry.name for entry in report}
        parts = {"model.embed_tokens": "embeddings", "lm_head": "output head", "norms": "norms"}
        kept = {name: words for name, words in parts.items() if name not in reported}
        said = "embeddings, output head and norms" if len(kept) == len(parts) else " and ".join(kept.values())
        report += [LayerReport(name, "kept", f"{said} stay as they are") for name in kept]
    return tuple(report)


def _changes(step: Step, block: decoder.Block) -> bool:
    return any(step.for_layer(name) is not None for name, _ in block.linears())


def _silent(done: int, total: int, what: str) -> None:
    pass
