"""The recipe that a published checkpoint stands for."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from compression.checkpoints.formats.bitsandbytes_config import BitsAndBytes
from compression.checkpoints.formats.compressed_tensors_config import (
    MXFP4,
    NVFP4,
    STATIC,
    CompressedTensors,
    Scheme,
)
from compression.checkpoints.formats.description import Description, GGUFTypes
from compression.checkpoints.formats.hqq_config import METHOD as HQQ
from compression.errors import RecipeError
from compression.recipes import registry
from compression.recipes.recipe import Recipe, Step


def recipe_of(published: Description, layers: Mapping[str, Scheme | None] | None = None) -> Recipe:
    """What makes such a checkpoint: the recipe that one of our own names, else its method with what is known of it.

    The formats compressed-tensors and torchao do not say by which method codes were found: such a checkpoint is called
    by its grid, as rounding to it (`rtn`, `rtn_fp`).

    Args:
        layers: of a checkpoint of groups of layers the scheme of every linear layer of the model; without it, layers
            with another setting than those of the first group are left out.
    """
    if published.recipe:
        with contextlib.suppress(RecipeError):
            if (found := Recipe.from_json(published.recipe)).steps:
                return found
    if isinstance(published, GGUFTypes):
        return Recipe()
    if isinstance(published, CompressedTensors):
        return Recipe(_steps(published, layers))
    if isinstance(published, BitsAndBytes):
        if published.bits == 4:
            return Recipe((Step(registry.build("nf4", {"double_quant": published.double_quant})),))
        return Recipe((Step(registry.build("llm_int8", {"threshold": published.threshold})),))
    known = {
        "bits": published.bits, "group_size": published.group_size, "symmetric": published.symmetric,
        "act_order": published.desc_act, "static_groups": published.static_groups,
    }  # fmt: skip
    taken = {field.name for field in dataclasses.fields(registry.resolve(published.quant_method))}  # type: ignore[arg-type]
    return Recipe((Step(registry.build(published.quant_method, {k: v for k, v in known.items() if k in taken})),))


def _steps(published: CompressedTensors, layers: Mapping[str, Scheme | None] | None) -> tuple[Step, ...]:
    """One step to each kind of number, with the setting of most of its layers, and the others by name."""
    if layers is None:
        return (Step(_method(next(iter(published.groups.values()))[1])),)
    methods = {name: None if scheme is None else _method(scheme) for name, scheme in layers.items()}
    stored = [each for each in methods.values() if each is not None]
    steps = []
    for kind in dict.fromkeys(map(type, stored)):
        most = Counter(each for each in stored if type(each) is kind).most_common(1)[0][0]
        others = {name: each if type(each) is kind else None for name, each in methods.items() if each != most}
        steps.append(Step(most, tuple(others.items())))
    return tuple(steps)


def _method(scheme: Scheme) -> Any:
    size = scheme.block[1] if scheme.block else scheme.group_size or -1
    if scheme.format == HQQ:
        return registry.build("hqq", {"bits": scheme.bits, "group_size": size})
    if scheme.activations is not None:
        name, static = scheme.activations.removesuffix(STATIC), scheme.activations.endswith(STATIC)
        return registry.build(name, {"activations": "static"} if static else {})
    if not scheme.float:
        return registry.build("rtn", {"bits": scheme.bits, "group_size": size, "symmetric": scheme.symmetric})
    scale = {NVFP4: "e4m3", MXFP4: "e8m0"}.get(scheme.format, "float")
    element = "e4m3" if scheme.bits == 8 else "e2m1"
    return registry.build("rtn_fp", {"element": element, "group_size": size, "scale": scale})


def check_recipe(published: Description, recipe: Recipe) -> None:
    """Refuse to measure a published checkpoint under a recipe that is not its own.

    Its own are: none, the one that it was made by, its method with its settings, and its method without any; each also
    with a `backend`, which is no property of the checkpoint.

    Raises:
        RecipeError: another one; the message names those.
    """
    if isinstance(published, CompressedTensors) and not published.recipe and recipe.steps:
        settings = {scheme for _, scheme in published.groups.values()}
        if len(settings) > 1:
            raise RecipeError(
                f"the base is a published checkpoint of {len(settings)} settings that does not name its recipe, so "
                f"that no recipe of one line is its own, {recipe.text} neither; compression.load opens it, and names "
                "the setting of every layer"
            )
    own = recipe_of(published)
    method = recipe_of(dataclasses.replace(published, recipe=None))
    named = method.text if isinstance(published, CompressedTensors | BitsAndBytes) else published.quant_method
    plain = Recipe(tuple(dataclasses.replace(step, method=_plain(step.method)) for step in recipe.steps))
    if plain.text not in ("fp16", own.text, method.text, named):
        raise RecipeError(
            f"the base is a published checkpoint, which is measured as it is: by {published.quant_method}, or in full "
            f"{method.text}{f' (made by {own.text})' if own != method else ''}; not by {recipe.text}, which wants the "
            "uncompressed checkpoint"
        )


def _plain(method: Any) -> Any:
    return dataclasses.replace(method, backend="auto") if hasattr(method, "backend") else method
