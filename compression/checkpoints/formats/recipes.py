"""The recipe that a published checkpoint stands for."""

import contextlib
import dataclasses
from typing import Any

from compression.checkpoints.formats.description import Published
from compression.errors import RecipeError
from compression.recipes import registry
from compression.recipes.recipe import Recipe, Step


def recipe_of(published: Published) -> Recipe:
    """What makes such a checkpoint: the recipe that one of our own names, else its method with what is known of it."""
    if published.recipe:
        with contextlib.suppress(RecipeError):
            return Recipe.from_json(published.recipe)
    known = {
        "bits": published.bits, "group_size": published.group_size, "symmetric": published.symmetric,
        "act_order": published.desc_act, "static_groups": published.static_groups,
    }  # fmt: skip
    taken = {field.name for field in dataclasses.fields(registry.resolve(published.quant_method))}  # type: ignore[arg-type]
    return Recipe((Step(registry.build(published.quant_method, {k: v for k, v in known.items() if k in taken})),))


def check_recipe(published: Published, recipe: Recipe) -> None:
    """Refuse to measure a published checkpoint under a recipe that is not its own.

    Its own are: none, the one that it was made by, its method with its settings, and its method without any; each also
    with a `backend`, which is no property of the checkpoint.

    Raises:
        RecipeError: another one; the message names those.
    """
    own = recipe_of(published)
    method = recipe_of(dataclasses.replace(published, recipe=None))
    plain = Recipe(tuple(dataclasses.replace(step, method=_plain(step.method)) for step in recipe.steps))
    if plain.text not in ("fp16", own.text, method.text, published.quant_method):
        raise RecipeError(
            f"the base is a published checkpoint, which is measured as it is: by {published.quant_method}, or in full "
            f"{method.text}{f' (made by {own.text})' if own != method else ''}; not by {recipe.text}, which wants the "
            "uncompressed checkpoint"
        )


def _plain(method: Any) -> Any:
    return dataclasses.replace(method, backend="auto") if hasattr(method, "backend") else method
