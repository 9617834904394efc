"""The runner: takes a base through the steps of a recipe."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compression import _blocks, _checkpoint, _kernels
from compression._artefact import Compressed, LayerReport
from compression._calibration import WAYS_OUT, Calibration, open_calibration
from compression._checkpoint import Base
from compression._cost import CostMeter
from compression._errors import CalibrationError, LayerError, RecipeError
from compression._recipe import Recipe, Step
from compression._registry import CalibratedMethod, LayerwiseMethod

Progress = Callable[[int, int, str], None]


@dataclass
class Context:
    """What a method may use while it runs.

    Attributes:
        step: the step that runs, with its settings per layer.
        device: where the model is.
        seed: for everything random; methods make generators of their own from it.
        progress: called with (done, total, what).
        report: methods add one entry per layer.
        calibration_tokens: tokens of calibration text that were read.
    """

    step: Step
    device: str
    seed: int
    progress: Progress
    report: list[LayerReport] = field(default_factory=list)
    calibration_tokens: int = 0


def compress(
    base: Base | str,
    recipe: Recipe | str,
    *,
    device: str | None = None,
    seed: int = 0,
    calibration: Any = None,
    progress: Progress | None = None,
) -> Compressed:
    """Apply a recipe to a base; the base's own model is left as it was.

    Args:
        base: an opened base, or its text (opened on `device`, default "cpu").
        recipe: an instance or its text.
        calibration: text for methods that need some: "embedded", "hub", "random", a folder, texts, or token ids
            (samples, length), see `compression._calibration`. None is the default of the base: the embedded text for
            the reference, random ids for random weights, none for others.
        progress: called with (done, total, what) as blocks are done.

    Raises:
        RecipeError: the recipe cannot be.
        CheckpointError: the base cannot be opened.
        LayerError: a layer cannot be taken; raised before any layer is touched where its shape is the reason.
        CalibrationError: a method needs calibration text, and there is none, too little, or none that can be read.
        BackendError: a library that the recipe asks for is not there.
    """
    recipe = Recipe.parse(recipe)
    if isinstance(base, str):
        check_source([recipe], _checkpoint.locate(base).fetch(), calibration)
        base = _checkpoint.open_base(base, device or "cpu", seed=seed)
    elif device not in (None, base.device):
        raise RecipeError(f"the base is on {base.device!r}; open it on {device!r} instead")
    else:
        check(recipe, base.model)
    source = find_calibration([recipe], base.source, calibration)
    if recipe.steps:
        _kernels.warm_up(base.device)
    model = _blocks.copy_sharing_tensors(base.model)  # methods replace modules and never write into a base's tensors
    executed: list[str] = []
    report: list[LayerReport] = []
    tokens = 0
    with CostMeter(base.device) as meter:
        for step, what in _schedule(recipe.steps):
            executed.append(what)
            if step is None:
                _dequantize(model)
                continue
            context = Context(step=step, device=base.device, seed=seed, progress=progress or _silent)
            inputs = None
            if isinstance(step.method, CalibratedMethod):
                inputs = _calibrate(step.method, model, base, source, context)
            model = _run(step, model, inputs, context)
            report, tokens = report + context.report, tokens + context.calibration_tokens
    if recipe.steps:
        reported = {entry.name for entry in report}
        report += [LayerReport(name, "kept", "embeddings, output head and norms stay as they are")
                   for name in ("model.embed_tokens", "lm_head", "norms") if name not in reported]  # fmt: skip
    return Compressed(
        model=model.eval().requires_grad_(False), recipe=recipe, base=(base.text, base.digest),
        executed=tuple(executed), report=tuple(report), cost=meter.cost(tokens),
        tokenizer_source=lambda: base.tokenizer,
    )  # fmt: skip


def _schedule(steps: Iterable[Step]) -> list[tuple[Step | None, str]]:
    """The steps, `dequantize` (None) where one does not take a packed model, and the last undone quantizer again.

    The last entry of what is returned leaves the model packed if any step of the recipe did.
    """
    schedule: list[tuple[Step | None, str]] = []
    state, quantizer = "dense", None
    for step in steps:
        info = step.method.info
        if state == "packed" and "packed" not in info.takes:
            schedule.append((None, "dequantize"))
            state = "dense"
        schedule.append((step, str(step)))
        if info.leaves == "packed" and state != "packed":  # a step that edits packed weights is no quantizer
            quantizer = step
        state = info.leaves
    if quantizer is not None and state != "packed":
        schedule.append((quantizer, str(quantizer)))
    return schedule


def check(recipe: Recipe, model: nn.Module) -> None:
    """Refuse what the shapes of the layers already forbid, and layers that ask for calibration of their own."""
    for step in recipe.steps:
        if isinstance(step.method, CalibratedMethod):
            for pattern, override in step.layers:
                if override is not None and override.calibration != step.method.calibration:  # type: ignore[attr-defined]
                    raise RecipeError(f"{step}: {pattern!r} cannot have samples or sequence_length of its own")
        if not isinstance(step.method, LayerwiseMethod):
            continue
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
                raise RecipeError(f"{step}: no layer matches {pattern!r}; layers are called e.g. {names[0]}, "
                                  f"{names[-1]}")  # fmt: skip


def find_calibration(recipes: Iterable[Recipe], source: _checkpoint.BaseSource, given: Any) -> Calibration | None:
    """The calibration that the recipes get on a base.

    Raises:
        CalibrationError: one of them needs some and there is none, or nothing is called as what was given.
    """
    found = open_calibration(given, source)
    needing = [recipe.text for recipe in recipes if any("calibration" in s.method.info.needs for s in recipe.steps)]
    if needing and found is None:
        raise CalibrationError(f"{needing[0]} needs calibration text, and {source.label!r} brings none; {WAYS_OUT}")
    return found


def check_source(recipes: Iterable[Recipe], source: _checkpoint.BaseSource, calibration: Any = None) -> nn.Module:
    """The same before any weight of a base is read; returns its model without weights.

    Raises:
        CheckpointError, RecipeError, LayerError, CalibrationError: as `compress`.
    """
    recipes = list(recipes)
    find_calibration(recipes, source, calibration)
    skeleton = _checkpoint.build(source.config, torch.bfloat16, device="meta")
    for recipe in recipes:
        check(recipe, skeleton)
    return skeleton


def _calibrate(
    method: CalibratedMethod, model: nn.Module, base: Base, source: Calibration | None, context: Context
) -> _blocks.Inputs:
    """What reaches the first block of the model as it is now."""
    assert source is not None  # find_calibration has refused
    ids = source.tokens(
        base.tokenizer, samples=method.samples, length=method.sequence_length, seed=context.seed,
        vocabulary=model.config.vocab_size,  # type: ignore[union-attr]
    )  # fmt: skip
    context.calibration_tokens += ids.numel()
    return _blocks.Inputs.of_first_block(model, ids.to(base.device))


def _run(step: Step, model: nn.Module, inputs: _blocks.Inputs | None, context: Context) -> nn.Module:
    if step.method.info.kind == "model":
        return step.method.apply(model, context)  # type: ignore[attr-defined]
    blocks = _blocks.decoder_blocks(model)
    for i, block in enumerate(blocks):
        step.method.compress_block(block, inputs, context)  # type: ignore[attr-defined]
        if inputs is not None and i + 1 < len(blocks):
            inputs.advance(block)
        context.progress(i + 1, len(blocks), str(step))
    return model


def _dequantize(model: nn.Module) -> None:
    for name, layer in _blocks.packed_layers(model).items():
        model.set_submodule(name, layer.to_linear())


def _silent(done: int, total: int, what: str) -> None:
    pass
