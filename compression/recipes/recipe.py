"""Recipes: the steps applied to a model, as text, as a value, as JSON.

Grammar::

    recipes   = recipe ("," recipe)*                     outside parentheses
    recipe    = "fp16" | step ("-" step)* | <path>.json
    step      = name [ "(" [ pair ("," pair)* ] ")" ] (":" pair)*
    pair      = name "=" value
    value     = number | "true" | "false" | "none" | word | JSON string | JSON object

`fp16` is the empty recipe: the checkpoint in its stored dtype. Of a step two parameters are reserved (`recipes.step`):
`layers` maps patterns of layer names (`fnmatch`) to the parameters that differ there, or to none for a layer that stays
as it is, and the first match wins; `keep` is how many blocks at either end of the model stay as they are.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compression.errors import RecipeError
from compression.files.strict_json import check_regular, strict_json, strict_prefix
from compression.files.text import read_text
from compression.recipes import registry
from compression.recipes.step import Step, make_step, with_settings

SCHEMA = 2
_DEFAULTS = {  # by schema: what a parameter that is left out meant until the next one
    1: {"gptq": {"symmetric": True, "act_order": False, "static_groups": False}},
}
UNCOMPRESSED = "fp16"

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Recipe:
    """A sequence of steps; empty for the uncompressed checkpoint. Prints back to its canonical text."""

    steps: tuple[Step, ...] = ()

    @classmethod
    def parse(cls, text: "str | Recipe") -> "Recipe":
        """Read a recipe from its text, or from a file if the text ends in `.json`.

        Raises:
            RecipeError: the text does not follow the grammar, or names an unknown method or parameter.
        """
        if isinstance(text, Recipe):
            return text
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise RecipeError(f"recipe {text!r} contains half of a surrogate pair; leave it out")
        if text.strip().endswith(".json"):
            return cls._from_file(Path(text.strip()))
        return _Parser(text).recipe()

    @classmethod
    def from_json(cls, value: Any) -> "Recipe":
        """The inverse of `to_json`; also the form of recipe files.

        What an older schema leaves out has the default that it had then.

        Raises:
            RecipeError: not of the form {"schema": 2, "steps": [{"method": ..., <parameters>}]}.
        """
        if (
            not isinstance(value, dict)
            or value.keys() != {"schema", "steps"}
            or type(value["schema"]) is not int
            or not 1 <= value["schema"] <= SCHEMA
            or not isinstance(value["steps"], list)
        ):
            raise RecipeError(f'a recipe in JSON is {{"schema": {SCHEMA}, "steps": [{{"method": ...}}]}}, got '
                              f"{json.dumps(value, default=str)[:120]}")  # fmt: skip
        steps = []
        for step in value["steps"]:
            if not isinstance(step, dict) or not isinstance(step.get("method"), str):
                raise RecipeError(f'every step of a recipe needs a "method", got {json.dumps(step, default=str)[:120]}')
            given = {k: v for k, v in step.items() if k != "method"}
            for schema in range(value["schema"], SCHEMA):
                given = _DEFAULTS[schema].get(step["method"], {}) | given
            steps.append(make_step(step["method"], given))
        return cls(tuple(steps))

    @classmethod
    def _from_file(cls, path: Path) -> "Recipe":
        try:
            check_regular(path)
            value = strict_json(read_text(path, ValueError))
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe file {str(path)!r} cannot be read as JSON: {error}") from error
        try:
            return cls.from_json(value)
        except RecipeError as error:
            raise RecipeError(f"recipe file {str(path)!r}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "steps": [{"method": step.name, **step.parameters} for step in self.steps]}

    def with_settings(self, settings: Mapping[str, Any]) -> "Recipe":
        """The recipe with these parameters set in every step that has them and leaves them at their defaults.

        >>> Recipe.parse("gptq(bits=3)-recover").with_settings({"group_size": 64, "bits": 4}).text
        'gptq(bits=3,group_size=64)-recover'

        Raises:
            RecipeError: a step does not allow the value.
        """
        return Recipe(tuple(with_settings(step, settings) for step in self.steps))

    @property
    def on_load(self) -> Step | None:
        """The step that an engine takes while it loads the model; None where this package takes all."""
        return next((step for step in self.steps if step.method.engine is not None), None)

    @property
    def exported(self) -> "Recipe":
        """All steps but `on_load`: what is handed to an engine. Raises RecipeError if a step comes after that one."""
        if self.on_load is None:
            return self
        if self.steps[-1] is not self.on_load:
            what = f"{self.text}: {self.on_load} must be the last step"
            raise RecipeError(f"{what}: {self.on_load.method.engine} takes it when it loads what the others made")
        return Recipe(self.steps[:-1])

    @cached_property
    def text(self) -> str:
        """The canonical text: aliases resolved, defaults left out. Parsing it gives an equal recipe."""
        return "-".join(map(str, self.steps)) or UNCOMPRESSED

    @property
    def slug(self) -> str:
        """The text as part of a file name; distinct recipes have distinct slugs."""
        return slug(self.text)

    def __str__(self) -> str:
        return self.text


def slug(text: str) -> str:
    """A text as part of a file name: itself if it can be one, else what can be kept of it and a short hash.

    >>> slug("nf4"), slug("gptq(bits=3)-recover")
    ('nf4', 'gptq-bits-3-recover-763c4773')
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", text):
        return text
    kept = re.sub(r"[^a-z0-9]+", "-", text.lower())[:80].strip("-")
    return f"{kept or 'x'}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"


def split_recipes(text: str) -> list[str]:
    """Split a comma-separated list of recipes; commas inside parentheses, braces and quotes do not split.

    >>> split_recipes("fp16,rtn(bits=3,group_size=64),nf4")
    ['fp16', 'rtn(bits=3,group_size=64)', 'nf4']
    """
    parts, depth, quoted, start, i = [], 0, False, 0, 0
    while i < len(text):
        char = text[i]
        if quoted:
            i += char == "\\"
            quoted = char != '"'
        elif char == '"':
            quoted = True
        elif char in "({[":
            depth += 1
        elif char in ")}]":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
        i += 1
    parts.append(text[start:].strip())
    if not all(parts):
        raise RecipeError(f"empty recipe in {text!r}: write recipes separated by single commas, e.g. fp16,nf4")
    return parts


def parse_setting(text: str) -> tuple[str, Any]:
    """A parameter and its value, written as in a recipe.

    >>> parse_setting("group_size=64")
    ('group_size', 64)

    Raises:
        RecipeError: the text is not of the form name=value.
    """
    parser, found = _Parser(text), {}
    parser.pair("the recipes", found)
    if parser.at < len(parser.text):
        raise parser.error("expected the end of name=value")
    return found.popitem()


class _Parser:
    """Recursive descent over one recipe; every error shows the place."""

    def __init__(self, text: str):
        self.text, self.at = text.strip(), 0

    def recipe(self) -> Recipe:
        if self.text == UNCOMPRESSED:
            return Recipe()
        self.at = len(f"{UNCOMPRESSED}-") if self.text.startswith(f"{UNCOMPRESSED}-") else 0
        steps = [self.step()]
        while self.take("-"):
            steps.append(self.step())
        if self.at < len(self.text):
            raise self.error("expected '-' and another step, or the end")
        return Recipe(tuple(steps))

    def step(self) -> Step:
        name = self.match(registry.NAME, "the name of a method in lower case")
        if name == UNCOMPRESSED:
            raise self.error(f"{UNCOMPRESSED} is the uncompressed checkpoint: it takes no parameters and stands first")
        parameters: dict[str, Any] = {}
        if self.take("(") and not self.take(")"):
            self.pair(name, parameters)
            while self.take(","):
                self.pair(name, parameters)
            if not self.take(")"):
                raise self.error("expected ',' or ')'")
        while self.take(":"):
            self.pair(name, parameters)
        return make_step(name, parameters)

    def pair(self, name: str, parameters: dict[str, Any]) -> None:
        key = self.match(registry.NAME, f"a parameter of {name}, e.g. {name}(key=value)")
        if not self.take("="):
            raise self.error(f"expected '=' after {key!r}")
        if key in parameters:
            raise self.error(f"parameter {key!r} is given twice")
        parameters[key] = self.value()

    def value(self) -> Any:
        if self.text[self.at : self.at + 1] in ('"', "{"):
            try:
                value, self.at = strict_prefix(self.text, self.at)
            except ValueError as error:
                raise self.error(f"not JSON: {error}") from error
            return value
        number = _NUMBER.match(self.text, self.at)
        if number and not registry.WORD.match(self.text, self.at):
            self.at = number.end()
            text = number.group()
            try:
                return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
            except ValueError as error:  # int() refuses thousands of digits
                raise self.error(str(error)) from error
        word = self.match(registry.WORD, "a value: a number, true, false, none, a word or a quoted string")
        return registry.CONSTANTS.get(word, word)

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.error(f"expected {what}")
        self.at = found.end()
        return found.group()

    def take(self, char: str) -> bool:
        hit = self.text.startswith(char, self.at)
        self.at += hit
        return hit

    def error(self, what: str) -> RecipeError:
        return RecipeError(
            f"recipe {self.text!r}, at character {self.at + 1} ({self.text[self.at : self.at + 12]!r}): {what}; "
            "recipes look like nf4, rtn(bits=3,group_size=64), p-kd-q"
        )
