"""What is refused before any work: by shapes, by what recipes need, and by what they would undo."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from compression.architectures import decoder
from compression.calibration.text import WAYS_OUT, Calibration, open_calibration
from compression.checkpoints import base
from compression.engine.schedule import is_whole, make_schedule
from compression.errors import CalibrationError, CompressionError, LayerError, RecipeError, TeacherError, TrainingError
from compression.layers import embedding
from compression.layers.packed import PackedLinear
from compression.recipes import registry
from compression.recipes.recipe import Recipe, Step
from compression.recipes.registry import CalibratedMethod, LayerwiseMethod, Quantizer
from compression.training import downstream as _downstream
from compression.training.downstream import Downstream, open_downstream

TOKENS_PER_INPUT = 10  # of calibration text, for every input of a layer whose weights are fitted to it


def thin_calibration(step: Step, model: nn.Module, tokens: int) -> str | None:
    """A sentence where a step fits a layer of the model to fewer than `TOKENS_PER_INPUT` tokens for each of its inputs.

    A Hessian (cols, cols) of few more than cols tokens is mostly chance: weights that make up for each other on it do
    so on no other text, and come out worse than rounded to nearest.
    """
    fitted = [
        linear.in_features
        for block in decoder.decoder_blocks(model)
        for name, linear in block.linears()
        if getattr(step.for_layer(name), "fits_hessian", False)
    ]
    widest = max(fitted, default=0)
    if tokens >= TOKENS_PER_INPUT * widest:
        return None
    length = step.method.calibration[1]  # type: ignore[index]
    return (
        f"{step} fits layers of up to {widest:,} inputs to {tokens:,} tokens of calibration text, "
        f"{tokens / widest:.2g} for each input; below {TOKENS_PER_INPUT} it fits chance, and can be worse than "
        f"rounding: give samples={-(-TOKENS_PER_INPUT * widest // length)} or more"
    )


def _check_zeros(recipe: Recipe) -> None:
    """Refuse a step that would lose the zeros of one before it."""
    pruning = None
    for step, _ in make_schedule(recipe.steps):
        if step is None:
            continue
        if pruning is not None and not step.method.info.keeps_zeros:
            keeping = [name for name, cls in registry.discover().items()
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
    model = decoder.without_weights(model)
    for step, _ in make_schedule(recipe.steps):
        if step is None:
            decoder.make_dense(model)
        else:
            if is_whole(step):
                model = step.method.reshape(model)
            _check_layers(step, model)
            _pack(step, model)
    return model


def _check_layers(step: Step, model: nn.Module) -> None:
    if isinstance(step.method, Quantizer):
        for pattern, override in step.layers:
            if override is not None and override.embeddings != step.method.embeddings:  # type: ignore[attr-defined]
                raise RecipeError(f"{step}: {pattern!r} cannot have embeddings of its own: they are of the model, and "
                                  "no layer of it")  # fmt: skip
    if isinstance(step.method, CalibratedMethod):
        for pattern, override in step.layers:
            if override is not None and override.calibration != step.method.calibration:
                raise RecipeError(f"{step}: {pattern!r} cannot have samples or sequence_length of its own")
    if not isinstance(step.method, LayerwiseMethod):
        return
    names = []
    for block in decoder.decoder_blocks(model):
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
    if getattr(step.method, "embeddings", 16) == 8:
        embedding.shaped(model)
    for block in decoder.decoder_blocks(model):
        for name, linear in block.linears():
            grid = getattr(step.for_layer(name), "grid", None)
            if grid is not None and isinstance(linear, nn.Linear):
                bias, dtype = linear.bias is not None, linear.weight.dtype
                block.replace(name, PackedLinear(
                    grid(), linear.in_features, linear.out_features, bias=bias, dtype=dtype, device="meta"
                ))  # fmt: skip


def find_calibration(recipes: Iterable[Recipe], source: base.BaseSource, given: Any) -> Calibration | None:
    """The calibration that the recipes get on a base.

    Raises:
        CalibrationError: one of them needs some and there is none, or nothing is called as what was given.
    """
    found = open_calibration(given, source)
    needing = [recipe.text for recipe in recipes if any(s.method.calibration for s in recipe.steps)]
    if needing and found is None:
        raise CalibrationError(f"{needing[0]} needs calibration text, and {source.label!r} brings none; {WAYS_OUT}")
    return found


def find_downstream(recipes: Iterable[Recipe], source: base.BaseSource, given: Any) -> Downstream | None:
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


def default_teacher(source: base.BaseSource) -> str | None:
    """The teacher that a base brings."""
    return "reference-teacher" if source.text == "reference" else None


def find_teacher(
    recipes: Iterable[Recipe], source: base.BaseSource, given: str | base.BaseSource | None
) -> base.BaseSource | None:
    """The teacher that the recipes get on a base, its tokenizer compared; None if none of them needs one.

    Raises:
        TeacherError: there is none, or its tokenizer is not that of the base.
        CheckpointError: nothing is called as what was given.
    """
    needing = [(recipe, step.method) for recipe in recipes for step in recipe.steps if step.method.teacher]
    if not needing:
        return None
    from compression.training.teacher import shared_vocabulary

    text = given or default_teacher(source)
    if text is None:
        raise TeacherError(f"{needing[0][0].text} needs a teacher, and {source.label!r} brings none; give teacher "
                           "(--teacher): a base of the same tokenizer, or self for the uncompressed base")  # fmt: skip
    if text in ("self", source):
        return source
    teacher = (text if isinstance(text, base.BaseSource) else base.locate(text)).fetch()
    for _, method in needing:
        rows = (source.config["vocab_size"], teacher.config["vocab_size"])
        shared_vocabulary(
            source.tokenizer, teacher.tokenizer, rows, allow_vocab_mismatch=method.allow_vocab_mismatch
        )  # fmt: skip
    return teacher


def check_source(
    recipes: Iterable[Recipe],
    source: base.BaseSource,
    calibration: Any = None,
    teacher: str | base.BaseSource | None = None,
    downstream: Any = None,
) -> nn.Module:
    """The same before any weight of a base is read; returns its model without weights.

    Raises:
        CheckpointError, RecipeError, LayerError, CalibrationError, TeacherError, TrainingError: as `compress`.
    """
    skeleton = base.build(source.config, torch.bfloat16, device="meta")
    for recipe in recipes:
        _check_on(recipe, skeleton, source, calibration, teacher, downstream)
    return skeleton


def check_format(recipe: Recipe, source: base.BaseSource, format: str) -> None:
    """Refuse a published format that cannot hold what a recipe packs at its end, as far as shapes tell.

    Raises:
        LayerError: it cannot; what `check` raises.
    """
    from compression.checkpoints.formats.model import describe_shapes

    model = check(recipe, base.build(source.config, torch.bfloat16, device="meta"))
    if recipe.steps and isinstance(getattr(make_schedule(recipe.steps)[-1][0], "method", None), Quantizer):
        describe_shapes(model, format)


def refusals(
    recipes: Iterable[Recipe],
    source: base.BaseSource,
    calibration: Any = None,
    teacher: str | base.BaseSource | None = None,
    downstream: Any = None,
) -> dict[str, str]:
    """Why recipes cannot be applied to a base, by their text; those that can be are not in it.

    Raises:
        CheckpointError, CalibrationError, TrainingError: base, calibration text, teacher or downstream task cannot be
            opened, which no recipe could do anything about.
    """
    skeleton = base.build(source.config, torch.bfloat16, device="meta")
    open_calibration(calibration, source)
    open_downstream(downstream, source)
    if isinstance(teacher, str) and teacher != "self":
        base.locate(teacher)
    found = {}
    for recipe in recipes:
        try:
            _check_on(recipe, skeleton, source, calibration, teacher, downstream)
        except CompressionError as error:
            found[recipe.text] = str(error)
    return found


def _check_on(
    recipe: Recipe, skeleton: nn.Module, source: base.BaseSource, calibration: Any,
    teacher: str | base.BaseSource | None, downstream: Any,
) -> None:  # fmt: skip
    find_calibration([recipe], source, calibration)
    find_teacher([recipe], source, teacher)
    find_downstream([recipe], source, downstream)
    check(recipe, skeleton)
