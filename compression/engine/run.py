"""The runner: takes a base through the steps of a plan."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from compression import devices
from compression.architectures import decoder
from compression.caches import replaying
from compression.checkpoints import base as _checkpoint
from compression.checkpoints.artefact import Compressed
from compression.checkpoints.base import Base, BaseSource
from compression.cost import Cost, CostMeter
from compression.engine.kept_steps import StepCache
from compression.engine.passes import (
    Context,
    Progress,
    around_blocks,
    full_report,
    make_contexts,
    make_passes,
    notes_of,
)
from compression.engine.plan import Plan, taken
from compression.engine.same_run import identity, planned_together
from compression.engine.schedule import is_whole
from compression.engine.shapes import policy_of
from compression.engine.stream import stream
from compression.errors import CheckpointError, RecipeError
from compression.files.atomic import code_digest, digest_of
from compression.files.strict_json import expanded
from compression.layers.kernels import choose
from compression.recipes.recipe import Recipe
from compression.workers import ALONE, Workers


def compress(
    base: Base | str,
    recipe: Recipe | str | Plan,
    *,
    into: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    calibration: Any = None,
    downstream: Any = None,
    teacher: str | BaseSource | None = None,
    cache: str | Path | StepCache | None = None,
    progress: Progress | None = None,
    workers: Workers = ALONE,
    dequantize: bool = False,
) -> Compressed:
    """Apply a recipe to a base; the base's own model is left as it was.

    Args:
        base: an opened base, or its text (opened on `device`, default "cpu").
        recipe: an instance or its text; or a plan of it on the base, which then settles text, task and teacher.
        into: a folder for the result, new, empty or left by such a call, which is then resumed; one block at a time is
            held (`engine.stream`). The base must be text, and the model returned has no weights: `load` opens it.
        calibration: text for methods that need some: "embedded", "hub", "random", a folder, texts, or token ids
            (samples, length), see `calibration.text`. None is the default of the base: the embedded text for the
            reference, random ids for random weights, none for others.
        downstream: the task that methods recover on: one of the embedded reference by name, a folder, or (prompt,
            answer) pairs, see `training.downstream`. None is "arithmetic" for the reference, none for others.
        teacher: the text of a base for methods that learn from one, or "self" for the uncompressed base; None is the
            default of the base: `reference-teacher` for the reference, none for others.
        cache: the folder of results of training, or a `StepCache`; None is `files.atomic.cache_folder()`. A recipe
            that trains begins behind the steps whose result is there.
        progress: called with (done, total, what) as blocks are done.
        workers: processes that share the work (`workers.joined`): each makes this call and gets the result of one.
        dequantize: whether the base may be a published quantized checkpoint, the start then the dense weights of it.

    Raises:
        RecipeError: the recipe cannot be; or, with `into`, has a step that needs the whole model at once.
        CheckpointError: base or cache cannot be read, or the folder not be written, or it holds something else.
        LayerError: a layer cannot be taken; raised before any layer is touched where its shape is the reason.
        CalibrationError: a method needs calibration text, and there is none, too little, or none that can be read.
        TeacherError: a method needs a teacher, and there is none, or it does not fit.
        TrainingError: training had to stop.
        BackendError: a library that the recipe asks for is not there.
        WorkerError: the processes do not fit together, or one is gone.
    """
    recipe = recipe if isinstance(recipe, Plan) else Recipe.parse(recipe)
    given = {"calibration": calibration, "downstream": downstream, "teacher": teacher}
    if into is not None:
        if isinstance(base, Base):
            raise RecipeError(f"into={str(into)!r} reads the base block by block; give the text {base.source.text!r}")
        return stream(into, lambda: taken(base, recipe, **given), device=device or "cpu", seed=seed, progress=progress,
                      workers=workers, dequantize=dequantize)  # fmt: skip
    if isinstance(base, Base) and device not in (None, base.device):
        raise RecipeError(f"the base is on {base.device!r}; open it on {device!r} instead")
    store = cache if isinstance(cache, StepCache) else StepCache(expanded(cache, CheckpointError) if cache else None)
    plan = planned_together(workers, lambda: taken(base, recipe, **given))
    if not isinstance(base, Base):
        opening = partial(_checkpoint.open_base, plan.source, device or "cpu", seed=seed, dequantize=dequantize)
        base = workers.each(opening)
    return _run(plan, base, store, seed, progress, workers)


def compress_to(folder: str | Path, base: str, recipe: Recipe | str | Plan, **options: Any) -> Path:
    """`compress(base, recipe, into=folder, ...)` for those who want the path of the folder."""
    compress(base, recipe, into=folder, **options)
    return Path(folder)


def _run(
    plan: Plan, base: Base, store: StepCache, seed: int, progress: Progress | None, workers: Workers
) -> Compressed:
    """Take a base through the steps of a plan, behind those whose result is kept."""
    contexts = make_contexts(plan, base.device, seed, progress, workers)
    workers.check_same(identity(plan, seed, base.device, contexts))
    keeps = store.folder if plan.trains else None
    for context in contexts:
        context.folder = keeps
        if plan.teacher is not None:
            context.open_teacher = partial(open_teacher, plan.teacher, device=base.device, seed=seed)
    identities = _identities(plan, contexts, base, store)
    begin, kept = store.find(identities, base.device) if workers.count == 1 else (0, None)
    run = _Run(plan, base, contexts, kept)
    if begin < len(contexts):
        choose.warm_up(base.device)
    with devices.repeatable(base.device), CostMeter(base.device) as meter:
        for done in range(begin, len(contexts)):
            run.take(contexts[done], meter)
            if (key := identities[done]) is not None and workers.rank == 0:
                store.put(key, run.result(done + 1, meter))
                for trained in contexts[done].trained:
                    shutil.rmtree(trained.folder, ignore_errors=True)
    run.report = list(full_report(run.report, run.model))
    return run.result(len(contexts), meter)


def open_teacher(source: BaseSource, recipe: str, *, device: str = "cpu", seed: int = 0) -> nn.Module:
    """The model of a teacher after a recipe that reads no data.

    Raises:
        CheckpointError, RecipeError, LayerError, BackendError: as `compress`.
    """
    base = _checkpoint.open_base(source, device, seed=seed, dequantize=True)
    return compress(base, recipe).model if Recipe.parse(recipe).steps else base.model


class _Run:
    """What the steps of a plan came to so far; those that were kept included."""

    def __init__(self, plan: Plan, base: Base, contexts: list[Context], kept: Compressed | None):
        self.plan, self.base, self.contexts = plan, base, contexts
        # methods replace modules and never write into a base's tensors
        self.model = decoder.copy_sharing_tensors(base.model) if kept is None else kept.model
        self.report = [] if kept is None else list(kept.report)
        self.seconds = [] if kept is None else list(kept.seconds)
        self.notes = [] if kept is None else list(kept.notes)
        self.before = Cost(seconds=0, peak_bytes=0) if kept is None or kept.cost is None else kept.cost

    def take(self, context: Context, meter: CostMeter) -> None:
        """Take the next step."""
        meter.lap()
        self.notes += notes_of(context, self.model)
        replaying.attach(self.model, None)  # steps see the layers alone
        self.model = _take(context, self.model, self.plan.recipe.text)
        self.seconds.append(meter.lap())
        self.report += context.report

    def result(self, steps: int, meter: CostMeter) -> Compressed:
        """What the first so many steps came to."""
        contexts, before, base = self.contexts[:steps], self.before, self.base
        trained = [run for context in contexts for run in context.trained]
        cost = dataclasses.replace(
            before.then(meter.cost(sum(context.calibration_tokens for context in contexts))),
            seconds=sum(self.seconds), trained_tokens=before.trained_tokens + sum(run.tokens for run in trained),
            trained_parameters=max(before.trained_parameters, *(run.parameters for run in trained), 0),
        )  # fmt: skip
        replaying.attach(self.model, policy_of(self.plan.schedule[:steps]))
        return Compressed(
            model=self.model.eval().requires_grad_(False), recipe=self.plan.recipe,
            base=(base.text, base.digest), executed=self.plan.executed[:steps], report=tuple(self.report),
            seconds=tuple(self.seconds), notes=tuple(self.notes), cost=cost,
            tokenizer_source=lambda: base.tokenizer, folder=base.source.folder,
        )  # fmt: skip


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


def _identities(plan: Plan, contexts: list[Context], base: Base, store: StepCache) -> list[dict[str, Any] | None]:
    """What the result of the first 1, 2, ... steps depends on; None for results that are not kept."""
    found: list[dict[str, Any] | None] = []
    steps, trains = [], False
    for (step, what), context in zip(plan.schedule, contexts, strict=True):
        text = None if context.ids is None else digest_of(context.ids)
        steps.append([what, text if context.downstream is None else context.downstream.digest])
        trains = trains or (step is not None and step.method.trains)
        if step is None or not (trains or store.keep([what for what, _ in steps])):
            found.append(None)
            continue
        cuda = base.device.startswith("cuda")
        found.append({
            "base": base.digest,
            "dtype": str(next(base.model.parameters()).dtype),
            "steps": list(steps),
            "teacher": None if plan.teacher is None or not trains else plan.teacher.digest,
            "seeds": [base.seed if base.source.kind == "random" else None, context.seed],
            "device": torch.cuda.get_device_name(base.device) if cuda else "cpu",
            "threads": None if cuda else torch.get_num_threads(),
            "version of torch": torch.__version__,
            "version of transformers": transformers.__version__,
            "code of this package": code_digest(),
        })  # fmt: skip
    return found
