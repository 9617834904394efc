"""One step of a recipe: a method with its parameters, and the layers on which they differ."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from compression.errors import RecipeError
from compression.recipes import registry
from compression.recipes.registry import Method


@dataclass(frozen=True)
class Step:
    """One method with its parameters, and the layers on which they differ.

    Attributes:
        method: the parameters; hashable and comparable.
        layers: (pattern, method or None) in order; None leaves the layer as it is.
        keep: blocks at either end of the model that stay as they are.
        kept: the names of those, once the model is known (`on`).
    """

    method: Method
    layers: tuple[tuple[str, Method | None], ...] = ()
    keep: int = 0
    kept: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.method.info.name

    def for_layer(self, layer: str) -> Method | None:
        """The method as set for one layer, or None where the layer is left alone."""
        if any(layer.startswith(f"{block}.") for block in self.kept):
            return None
        for pattern, override in self.layers:
            if fnmatch.fnmatchcase(layer, pattern):
                return override
        return self.method

    def on(self, blocks: Sequence[str]) -> "Step":
        """The step on a model whose blocks have these names. Raises RecipeError: it would keep all of them."""
        if not self.keep:
            return self
        if 2 * self.keep >= len(blocks):
            raise RecipeError(f"{self}: keep={self.keep} at either end leaves none of {len(blocks)} blocks; give less")
        return replace(self, kept=(*blocks[: self.keep], *blocks[-self.keep :]))

    @property
    def parameters(self) -> dict[str, Any]:
        """What differs from the defaults, `layers` and `keep` included: JSON-ready."""
        parameters = registry.non_default(self.method)
        if self.keep:
            parameters["keep"] = self.keep
        if self.layers:
            parameters["layers"] = {
                pattern: None if override is None else _difference(override, self.method)
                for pattern, override in self.layers
            }
        return parameters

    def __str__(self) -> str:
        return registry.spell_call(self.name, self.parameters)


def make_step(name: str, parameters: Mapping[str, Any]) -> Step:
    """A step of checked parameters. Raises RecipeError: one is unknown, of the wrong type or out of its range."""
    own = {key: value for key, value in parameters.items() if key not in ("layers", "keep")}
    method = registry.build(name, own)
    keep = parameters.get("keep", 0)
    if type(keep) is not int or keep < 0:
        raise RecipeError(f"{name}(keep={registry.spell_value(keep)}): must be a whole number, that of the blocks at "
                          "either end of the model that stay as they are")  # fmt: skip
    if keep and method.unit not in ("layer", "block"):
        raise RecipeError(f"{name} works on the whole model: it keeps no blocks")
    layers = parameters.get("layers", {})
    if not isinstance(layers, Mapping):
        raise RecipeError(f'{name}(layers=...) must map patterns to parameters, e.g. {{"*.down_proj":{{"bits":8}}}}, '
                          f"got {layers!r}")  # fmt: skip
    if layers and not method.per_layer:
        whole = "a whole block" if method.unit == "block" else "the whole model"
        raise RecipeError(f"{name} works on {whole}: it takes no settings per layer")
    overrides: list[tuple[str, Method | None]] = []
    for pattern, changed in layers.items():
        if changed is not None and not isinstance(changed, Mapping):
            raise RecipeError(f"{name}(layers=...): {pattern!r} must map to parameters or none, got {changed!r}")
        override = None if changed is None else registry.build(
            name, {**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)}, **changed})  # type: ignore[arg-type]  # fmt: skip
        overrides.append((pattern, override))
    return Step(method, tuple(overrides), keep)


def _difference(override: Method, method: Method) -> dict[str, Any]:
    return {
        field.name: getattr(override, field.name)
        for field in dataclasses.fields(override)  # type: ignore[arg-type]
        if getattr(override, field.name) != getattr(method, field.name)
    }


def with_settings(step: Step, settings: Mapping[str, Any]) -> Step:
    """The step with those of these parameters that it has and leaves at their defaults."""
    parameters = step.parameters
    unset = {f.name for f in dataclasses.fields(step.method)} - parameters.keys()  # type: ignore[arg-type]
    changed = {name: value for name, value in settings.items() if name in unset}
    return make_step(step.name, {**parameters, **changed}) if changed else step
