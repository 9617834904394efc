"""What shapes tell of a recipe before any weight is read: what it would store, and what it cannot take."""

import contextlib
import inspect
import traceback
from collections.abc import Iterator

import torch
from torch import nn

from compression.architectures import decoder, embeddings
from compression.caches import replaying
from compression.caches.policy import Policy
from compression.engine.schedule import Schedule, is_whole, make_schedule
from compression.errors import CompressionError, LayerError, RecipeError
from compression.layers.linear import Linear
from compression.layers.stored import describe, restore
from compression.methods.base import BlockMethod, LayerMethod, Quantizer
from compression.methods.cached import CacheMethod
from compression.methods.calibrated import CalibratedMethod
from compression.methods.rounding import RoundingQuantizer
from compression.recipes import registry
from compression.recipes.recipe import Recipe, Step

TOKENS_PER_INPUT = 10  # of calibration text, for every input of a layer whose weights are fitted to it


def outcome(recipe: Recipe, model: nn.Module, schedule: Schedule | None = None) -> nn.Module:
    """The model that a recipe makes of one, without weights, as far as shapes tell what it stores.

    Args:
        model: whose weights, if it has some, are not looked at.
        schedule: of the recipe, if it was made.

    Raises:
        RecipeError: zeros would be lost, settings of a layer contradict those of the step, or the code of a method
            failed on a layer without weights.
        LayerError: a step cannot take the shape of a layer, or what the steps before it leave.
    """
    schedule = make_schedule(recipe.steps) if schedule is None else schedule
    _check_zeros(recipe, schedule)
    model = decoder.without_weights(model)
    policy = policy_of(schedule)
    for step, _ in schedule:
        if step is None:
            decoder.make_dense(model)
        else:
            step = step.on([block.name for block in decoder.decoder_blocks(model)])
            with _told_of(step):
                if is_whole(step):
                    model = step.method.reshape(model)
                _check_settings(step)
                _check_layers(step, model)
                _store(step, model)
    replaying.attach(model, policy)
    return model


def policy_of(schedule: Schedule) -> Policy | None:
    """How the steps of a schedule store keys and values; None if none of them says.

    Raises:
        RecipeError: two of them say.
        LayerError: the settings of one contradict each other.
    """
    steps = [step for step, _ in schedule if step is not None and isinstance(step.method, CacheMethod)]
    if len(steps) > 1:
        raise RecipeError(f"{steps[0]} and {steps[1]} both say how the cache stores keys and values; leave one out")
    return steps[0].method.policy if steps else None  # type: ignore[attr-defined]


@contextlib.contextmanager
def _told_of(step: Step) -> Iterator[None]:
    """Any error in the code of a method, asked of a row of zeros without a context, as a RecipeError with its place."""
    try:
        yield
    except CompressionError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == inspect.getfile(type(step.method))]
        last = [*frames, *own][-1]
        raise RecipeError(f"{step} cannot be planned: {type(step.method).__name__} raised {type(error).__name__} on "
                          f"a row of zeros: {error} ({last.filename}:{last.lineno})") from error  # fmt: skip


def thin_calibration(step: Step, model: nn.Module, tokens: int) -> str | None:
    """A sentence where a step fits a layer of the model to fewer than `TOKENS_PER_INPUT` tokens for each of its inputs.

    A Hessian (cols, cols) of few more than cols tokens is mostly chance: weights that make up for each other on it do
    so on no other text, and come out worse than rounded to nearest.
    """
    blocks = decoder.decoder_blocks(model)
    step = step.on([block.name for block in blocks])
    fitted = [
        linear.in_features
        for block in blocks
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


def _check_zeros(recipe: Recipe, schedule: Schedule) -> None:
    """Refuse a step that would lose the zeros of one before it."""
    pruning = None
    for step, _ in schedule:
        if step is None:
            continue
        if pruning is not None and not step.method.info.keeps_zeros:
            keeping = [name for name, cls in registry.discover().items()
                       if cls.info.leaves == "packed" and cls.info.keeps_zeros]  # fmt: skip
            raise RecipeError(f"{recipe.text}: {step} would lose the zeros that {pruning} makes, because zero is not "
                              f"among its levels; quantizers that keep them: {', '.join(keeping)}")  # fmt: skip
        pruning = {"sparse": step, "dense": None}.get(step.method.info.leaves, pruning)


def _check_settings(step: Step) -> None:
    """Refuse settings of single layers that are of the model or of the text."""
    for pattern, override in step.layers:
        if override is None:
            continue
        if isinstance(step.method, Quantizer) and override.embeddings != step.method.embeddings:  # type: ignore[attr-defined]
            raise RecipeError(f"{step}: {pattern!r} cannot have embeddings of its own: they are of the model, and "
                              "no layer of it")  # fmt: skip
        if isinstance(step.method, CalibratedMethod) and override.calibration != step.method.calibration:
            raise RecipeError(f"{step}: {pattern!r} cannot have samples or sequence_length of its own")
        if isinstance(step.method, RoundingQuantizer) and override.fits_hessian and not step.method.fits_hessian:  # type: ignore[attr-defined]
            raise RecipeError(f"{step}: {pattern!r} cannot have rounding=gptq where no Hessian is measured; set "
                              "rounding=gptq for the whole recipe, and nearest for the other layers")  # fmt: skip


def _check_layers(step: Step, model: nn.Module) -> None:
    if not isinstance(step.method, LayerMethod):
        return
    names = []
    for block in decoder.decoder_blocks(model):
        for name, linear in block.linears():
            names.append(name)
            method = step.for_layer(name)
            if method is not None:
                try:
                    method.in_block(name, block).check_layer(linear.in_features, linear.out_features)  # type: ignore[attr-defined]
                except LayerError as error:
                    raise LayerError(f"{step} cannot take {name}: {error}") from error
    for pattern, override in step.layers:
        if not any(Step(step.method, ((pattern, override),)).for_layer(n) is override for n in names):
            raise RecipeError(f"{step}: no layer matches {pattern!r}; layers are called e.g. {names[0]}, {names[-1]}")


def _store(step: Step, model: nn.Module) -> None:
    """Put what a step stores, without weights, where its shapes are known beforehand."""
    if getattr(step.method, "embeddings", 16) == 8:
        embeddings.shaped(model)
    if isinstance(step.method, BlockMethod):
        for block in decoder.decoder_blocks(model):
            if block.name not in step.kept:
                step.method.shape_block(block)
        return
    if isinstance(step.method, CacheMethod):
        for block in decoder.decoder_blocks(model):
            step.method.check_block(block)
        return
    made: dict[tuple, Linear | None] = {}  # a layer of one row, by what it is made from
    for block in decoder.decoder_blocks(model):
        for name, linear in block.linears():
            method = step.for_layer(name)
            if not isinstance(linear, nn.Linear) or method is None:
                continue
            if isinstance(method, LayerMethod):
                method = method.in_block(name, block)
            key = (method, linear.in_features, linear.bias is not None, linear.weight.dtype)
            if key not in made:
                made[key] = packed_row(method, *key[1:])
            if (row := made[key]) is not None:
                block.replace(name, restore(describe(row) | {"out_features": linear.out_features}))


def packed_row(method: object, in_features: int, bias: bool, dtype: torch.dtype) -> Linear | None:
    """A layer of one output as a quantizer makes it; None of other methods, whose shapes depend on weights.

    The one place that asks a method what it stores. Parts, settings and library are therefore those of the run.
    """
    if not isinstance(method, Quantizer):
        return None
    blank = nn.Linear(in_features, 1, bias=bias, dtype=dtype, device="meta").requires_grad_(False)
    blank.load_state_dict(
        {name: torch.zeros_like(t, device="cpu") for name, t in blank.state_dict().items()}, assign=True
    )
    layer = method.compress_linear(blank, None)
    return layer if isinstance(layer, Linear) else None
