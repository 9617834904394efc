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

from compression import _blocks, _checkpoint, _downstream, _kernels, _registry
from compression._artefact import LEFT_ALONE, Compressed, LayerReport
from compression._cache import StepCache, default_folder
from compression._calibration import WAYS_OUT, Calibration, open_calibration
from compression._checkpoint import Base
from compression._cost import Cost, CostMeter
from compression._downstream import Downstream, open_downstream
from compression._errors import CalibrationError, LayerError, RecipeError, TeacherError, TrainingError
from compression._files import code_digest, digest_of
from compression._linear import PackedLinear
from compression._recipe import Recipe, Step
from compression._registry import CalibratedMethod, LayerwiseMethod

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
    teacher: str | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Apply a recipe to a base; the base's own model is left as it was.

    Args:
        base: an opened base, or its text (opened on `device`, default "cpu").
        recipe: an instance or its text.
        calibration: text for methods that need some: "embedded", "hub", "random", a folder, texts, or token ids
            (samples, length), see `compression._calibration`. None is the default of the base: the embedded text for
            the reference, random ids for random weights, none for others.
        downstream: the task that methods recover on: one of the embedded reference by name, a folder, or (prompt,
            answer) pairs, see `compression._downstream`. None is "arithmetic" for the reference, none for others.
        teacher: the text of a base for methods that learn from one, or "self" for the uncompressed base; None is the
            default of the base: `reference-teacher` for the reference, none for others.
        cache: the folder in which training keeps what later runs can use, or a `StepCache`; None is
            `compression._cache.default_folder()`. A recipe that trains begins behind the steps whose result is there.
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
    if isinstance(base, str):
        check_source([recipe], _checkpoint.locate(base).fetch(), calibration, teacher, downstream)
        base = _checkpoint.open_base(base, device or "cpu", seed=seed)
    elif device not in (None, base.device):
        raise RecipeError(f"the base is on {base.device!r}; open it on {device!r} instead")
    else:
        check(recipe, base.model)
    text = find_calibration([recipe], base.source, calibration)
    task = find_downstream([recipe], base.source, downstream)
    taught_by = find_teacher([recipe], base.source, teacher)
    store = cache if isinstance(cache, StepCache) else StepCache(Path(cache) if cache else default_folder())
    schedule = make_schedule(recipe.steps)
    model = _blocks.copy_sharing_tensors(base.model)  # methods replace modules and never write into a base's tensors
    contexts = make_contexts(schedule, model, base.source, text, base.device, seed, progress)
    for context in contexts:
        context.teacher, context.folder = taught_by, store.folder
        context.downstream = task if context.step is not None and context.step.method.downstream else None
    identities = _identities(schedule, contexts, base, store)
    begin, kept = store.find(identities, base.device)
    report, seconds = ([], []) if kept is None else (list(kept.report), list(kept.seconds))
    model = model if kept is None else kept.model
    if begin < len(schedule):
        _kernels.warm_up(base.device)

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
            cost=cost, tokenizer_source=lambda: base.tokenizer,
        )  # fmt: skip

    with CostMeter(base.device) as meter:
        for done in range(begin, len(schedule)):
            meter.lap()
            model = _take(contexts[done], model, recipe.text)
            seconds.append(meter.lap())
            report += contexts[done].report
            if (identity := identities[done]) is not None:
                store.put(identity, result(done + 1))
                for run in contexts[done].trained:
                    shutil.rmtree(run.folder, ignore_errors=True)
    report[:] = full_report(report)
    return result(len(schedule))


def _take(context: Context, model: nn.Module, what: str) -> nn.Module:
    """The model after one step of a schedule."""
    step = context.step
    if step is not None and is_whole(step):
        return step.method.apply(model, context)  # type: ignore[attr-defined]
    [each] = make_passes([context], model)
    each.enter(model)
    blocks = _blocks.decoder_blocks(model)
    for i, block in enumerate(blocks):
        each.take(i, block)
        context.progress(i + 1, len(blocks), what)
    return model


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
    inputs: _blocks.Inputs | None = None

    @property
    def ids(self) -> Tensor | None:
        """Token ids (samples, length) for a step that reads inputs."""
        return self.context.ids

    def enter(self, model: nn.Module, at: int = 0, hidden: list[Tensor] | None = None) -> None:
        """Stand before block `at`, with the hidden states that reached it; at the first, they come from the text."""
        if self.ids is not None and at <= self.last:
            self.inputs = (
                _blocks.Inputs.of_first_block(model, self.ids)
                if hidden is None
                else _blocks.Inputs.of_block(at, hidden, model, self.ids)
            )

    def take(self, index: int, block: _blocks.Block) -> None:
        """Compress block number `index`."""
        if self.step is None:
            _blocks.make_dense(block.module)
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
    passes, blocks = [], _blocks.decoder_blocks(model)
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
        report += [LayerReport(name, "kept", "embeddings, output head and norms stay as they are")
                   for name in ("model.embed_tokens", "lm_head", "norms") if name not in reported]  # fmt: skip
    return tuple(report)


def is_whole(step: Step | None) -> bool:
    """Whether a step needs the whole model at once."""
    return step is not None and step.method.whole


def make_schedule(steps: Iterable[Step]) -> list[tuple[Step | None, str]]:
    """The steps, `dequantize` (None) where one does not take a packed model, and the last undone quantizer again.

    The last entry of what is returned leaves the model packed if any step of the recipe did. Steps on layers make those
    that pruning did not store densely dense one by one; before a step on the whole model `densify` (None) does.
    """
    schedule: list[tuple[Step | None, str]] = []
    state, quantizer = "dense", None
    for step in steps:
        info = step.method.info
        if state == "packed" and "packed" not in info.takes:
            schedule.append((None, "dequantize"))
            state = "dense"
        if state == "sparse" and is_whole(step) and "sparse" not in info.takes and _stores(schedule[-1][0]):
            schedule.append((None, "densify"))
        schedule.append((step, str(step)))
        leaves = info.leaves or state
        if leaves == "packed" and state != "packed":  # a step that edits packed weights is no quantizer
            quantizer = step
        state = leaves
    if quantizer is not None and state != "packed":
        schedule.append((quantizer, str(quantizer)))
    return schedule


def _stores(step: Step | None) -> bool:
    """Whether a pruning step stores a layer other than densely."""
    methods = [] if step is None else [step.method, *(override for _, override in step.layers)]
    return any(getattr(method, "store", "dense") != "dense" for method in methods)


def _check_zeros(recipe: Recipe) -> None:
    """Refuse a step that would lose the zeros of one before it."""
    pruning = None
    for step, _ in make_schedule(recipe.steps):
        if step is None:
            continue
        if pruning is not None and not step.method.info.keeps_zeros:
            keeping = [name for name, cls in _registry.discover().items()
                       if cls.info.leaves == "packed" and cls.info.keeps_zeros]  # fmt: skip
            raise RecipeError(f"{recipe.text}: {step} would lose the zeros that {pruning} makes, because zero is not "
                              f"among its levels; quantizers that keep them: {', '.join(keeping)}")  # fmt: skip
        pruning = {"sparse": step, "dense": None}.get(step.method.info.leaves, pruning)


def check(recipe: Recipe, model: nn.Module) -> nn.Module:
    """Refuse what shapes already forbid, those that earlier steps leave included, layers that ask for calibration of
    their own, and zeros that would be lost.

    Returns the model that the recipe makes, without weights, as far as shapes tell what it stores.

    Raises:
        RecipeError, LayerError: as `compress`.
    """
    _check_zeros(recipe)
    model = _blocks.without_weights(model)
    for step, _ in make_schedule(recipe.steps):
        if step is None:
            _blocks.make_dense(model)
        else:
            if is_whole(step):
                model = step.method.reshape(model)
            _check_layers(step, model)
            _pack(step, model)
    return model


def _check_layers(step: Step, model: nn.Module) -> None:
    if isinstance(step.method, CalibratedMethod):
        for pattern, override in step.layers:
            if override is not None and override.calibration != step.method.calibration:
                raise RecipeError(f"{step}: {pattern!r} cannot have samples or sequence_length of its own")
    if not isinstance(step.method, LayerwiseMethod):
        return
    names = []
    for block in _blocks.decoder_blocks(model):
        for name, linear in block.linears():
            names.append(name)
            method = step.for_layer(name)
            if method is not None:
                try:
                    method.check_layer(linear.in_features, linear.out_features)  # type: ignore[attr-defined]
                except LayerError as error:
                    raise LayerError(f"{step} cannot take {name}: {error}") from error
    for pattern, override in step.layers:
        if not any(Step(step.method, ((pattern, override),)).for_layer(n) is override for n in names):
            raise RecipeError(f"{step}: no layer matches {pattern!r}; layers are called e.g. {names[0]}, {names[-1]}")


def _pack(step: Step, model: nn.Module) -> None:
    """Puts layers without weights where a step packs some."""
    for block in _blocks.decoder_blocks(model):
        for name, linear in block.linears():
            grid = getattr(step.for_layer(name), "grid", None)
            if grid is not None and isinstance(linear, nn.Linear):
                bias, dtype = linear.bias is not None, linear.weight.dtype
                block.replace(name, PackedLinear(
                    grid(), linear.in_features, linear.out_features, bias=bias, dtype=dtype, device="meta"
                ))  # fmt: skip


def find_calibration(recipes: Iterable[Recipe], source: _checkpoint.BaseSource, given: Any) -> Calibration | None:
    """The calibration that the recipes get on a base.

    Raises:
        CalibrationError: one of them needs some and there is none, or nothing is called as what was given.
    """
    found = open_calibration(given, source)
    needing = [recipe.text for recipe in recipes if any(s.method.calibration for s in recipe.steps)]
    if needing and found is None:
        raise CalibrationError(f"{needing[0]} needs calibration text, and {source.label!r} brings none; {WAYS_OUT}")
    return found


def find_downstream(recipes: Iterable[Recipe], source: _checkpoint.BaseSource, given: Any) -> Downstream | None:
    """The downstream task that the recipes recover on; None if none of them does.

    Raises:
        TrainingError: one of them does, and there is none; or nothing is called as what was given.
    """
    found = open_downstream(given, source)
    needing = [recipe.text for recipe in recipes if any(step.method.downstream for step in recipe.steps)]
    if needing and found is None:
        raise TrainingError(f"{needing[0]} trains on a downstream task, and {source.label!r} brings none; "
                            f"{_downstream.WAYS_OUT}")  # fmt: skip
    return found if needing else None


def find_teacher(
    recipes: Iterable[Recipe], source: _checkpoint.BaseSource, given: str | None
) -> _checkpoint.BaseSource | None:
    """The teacher that the recipes get on a base, its tokenizer compared; None if none of them needs one.

    Raises:
        TeacherError: there is none, or its tokenizer is not that of the base.
        CheckpointError: nothing is called as what was given.
    """
    needing = [(recipe, step.method) for recipe in recipes for step in recipe.steps if step.method.teacher]
    if not needing:
        return None
    from compression.distillation._teacher import shared_vocabulary

    text = given or ("reference-teacher" if source.text == "reference" else None)
    if text is None:
        raise TeacherError(f"{needing[0][0].text} needs a teacher, and {source.label!r} brings none; give teacher "
                           "(--teacher): a base of the same tokenizer, or self for the uncompressed base")  # fmt: skip
    if text == "self":
        return source
    teacher = _checkpoint.locate(text).fetch()
    for _, method in needing:
        rows = (source.config["vocab_size"], teacher.config["vocab_size"])
        shared_vocabulary(
            source.tokenizer, teacher.tokenizer, rows, allow_vocab_mismatch=method.allow_vocab_mismatch
        )  # fmt: skip
    return teacher


def check_source(
    recipes: Iterable[Recipe],
    source: _checkpoint.BaseSource,
    calibration: Any = None,
    teacher: str | None = None,
    downstream: Any = None,
) -> nn.Module:
    """The same before any weight of a base is read; returns its model without weights.

    Raises:
        CheckpointError, RecipeError, LayerError, CalibrationError, TeacherError, TrainingError: as `compress`.
    """
    recipes = list(recipes)
    find_calibration(recipes, source, calibration)
    find_teacher(recipes, source, teacher)
    find_downstream(recipes, source, downstream)
    skeleton = _checkpoint.build(source.config, torch.bfloat16, device="meta")
    for recipe in recipes:
        check(recipe, skeleton)
    return skeleton


def _changes(step: Step, block: _blocks.Block) -> bool:
    return any(step.for_layer(name) is not None for name, _ in block.linears())


def _silent(done: int, total: int, what: str) -> None:
    pass
