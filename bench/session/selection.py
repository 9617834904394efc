"""The recipes of a run: `--model`, changed by `--set`, and why some of a named list are refused."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from bench.errors import OptionError
from bench.metrics.recovery import DEFAULT as FAMILIES
from bench.report.orders import RECIPES
from bench.report.recipe_lists import ALL
from compression import Recipe, RecipeError, list_methods, parse_setting, split_recipes
from compression.recipes.recipe import UNCOMPRESSED


@dataclass(frozen=True)
class Selection:
    """Recipes in their order.

    Attributes:
        recipes: each once.
        named: whether they are a list of the suite's own (`all`, `report`, `orderings`): of such a list a recipe that
            cannot be has rows that say why, and the others are measured. Recipes written out are refused instead.
        refused: by recipe text, why `--set` cannot be applied to it; only of a named list.
        listed: by recipe text, how the list calls it, without what `--set` changes.
    """

    recipes: tuple[Recipe, ...]
    named: bool
    refused: Mapping[str, str] = field(default_factory=dict)
    listed: Mapping[str, str] = field(default_factory=dict)


def select(config: pytest.Config) -> Selection:
    """What `--model`, without it `-m`, and `--set` choose.

    Raises:
        RecipeError: a recipe is invalid.
        OptionError: `--set` is not of the form name=value, or no recipe has the parameter.
    """
    default = {"ordering": "orderings", "recovery": FAMILIES}.get(config.option.markexpr, "nf4")
    text = config.getoption("--model") or default
    lists = {"all": [UNCOMPRESSED, *list_methods()], "orderings": RECIPES, "report": ALL}
    named = text in lists
    listed = list(dict.fromkeys(Recipe.parse(each) for each in lists.get(text) or split_recipes(text)))
    settings = _settings(config.getoption("--set"), listed)
    recipes: dict[Recipe, str] = {}
    refused = {}
    for recipe in listed:
        try:
            changed = recipe.with_settings(settings)
        except RecipeError as error:
            if not named:
                raise
            changed, refused[recipe.text] = recipe, f"--set: {error}"
        recipes.setdefault(changed, recipe.text)
    return Selection(tuple(recipes), named, refused, {recipe.text: text for recipe, text in recipes.items()})


def _settings(given: Sequence[str] | None, recipes: Sequence[Recipe]) -> dict[str, object]:
    settings = {}
    for each in given or ():
        try:
            name, value = parse_setting(each)
        except RecipeError as error:
            raise OptionError(f"--set {each}: {error}") from error
        if name in settings:
            raise OptionError(f"--set {each}: {name} is given twice")
        settings[name] = value
    known = {f.name for recipe in recipes for step in recipe.steps for f in dataclasses.fields(step.method)}  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            raise OptionError(f"--set {name}: no method of {', '.join(recipe.text for recipe in recipes)} has the "
                              f"parameter {name!r}; they have {', '.join(sorted(known)) or 'none'}")  # fmt: skip
    return settings
