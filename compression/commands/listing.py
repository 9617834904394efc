"""`python -m compression list`: methods; with `--formats`, what formats hold of each, and the engines that open it."""

import argparse
import contextlib
import json
import typing
from collections.abc import Iterator

import compression
from compression import CompressionError, Recipe, architectures, devices
from compression.checkpoints.formats import registry as formats
from compression.errors import LayerError
from compression.methods.base import LayerMethod
from compression.recipes.registry import built_in, describe_parameters


def list_methods(options: argparse.Namespace) -> int:
    """Methods, parameters, needs, and the kernel that a bf16 layer of each gets on this device."""
    device = devices.default(options.device)
    entries = [
        {
            "method": name,
            "aliases": list(method.info.aliases),
            "family": method.info.family,
            "summary": method.info.summary,
            "parameters": describe_parameters(method),
            "needs": list(method.info.needs),
            "kernels": _kernels(name, method, device),
        }
        for name, method in compression.list_methods().items()
    ]
    if options.json:
        print(json.dumps(entries, indent=1))
        return 0
    for entry in entries:
        print(f"{', '.join([entry['method'], *entry['aliases']])} ({entry['family']}): {entry['summary']}")
        for what in ("parameters", "needs", "kernels"):
            print(f"    {what}: {', '.join(entry[what]) or 'none'}")
    return 0


def list_formats(options: argparse.Namespace) -> int:
    """For each method the formats that hold what it stores exactly, and which engine opens it there."""
    entries = [{"recipe": text, "formats": holding(text)} for text in spellings()]
    if options.json:
        print(json.dumps(entries, indent=1))
        return 0
    for entry in entries:
        print(f"{entry['recipe']}:")
        for format, engines in entry["formats"].items():
            opening = ", ".join(engine for engine, why in engines.items() if why is None) or "this package"
            print(f"    {format}: {opening}")
            for why in filter(None, engines.values()):
                print(f"        {why}")
    return 0


def spellings() -> Iterator[str]:
    """Every built-in method by itself; with each number of bits, and symmetric, where it has these settings."""
    for name, method in built_in().items():
        types = typing.get_type_hints(method)
        settings = [f"bits={bits}" for bits in typing.get_args(types.get("bits"))] or [""]
        for each in settings:
            yield f"{name}({each})" if each else name
            if "symmetric" in types:
                yield f"{name}({','.join(filter(None, (each, 'symmetric=true')))})"


def holding(recipe: str, base: str = "reference") -> dict[str, dict[str, str | None]]:
    """The formats that hold what a recipe makes of a base, as far as shapes tell, and for each engine why it does not
    open it there; None where it does.

    Raises:
        CompressionError: the recipe cannot be.
    """
    steps = Recipe.parse(recipe)
    if steps.on_load is not None:
        exported = holding(steps.exported.text, base)[formats.OWN]
        return {formats.OWN: {engine: None for engine in exported if engine == steps.on_load.method.engine}}
    needs = {need for step in steps.steps for need in step.method.info.needs}
    given = {"teacher": "self"} if "teacher" in needs else {}
    outcome = compression.plan(base, steps, **given).outcome
    dense = not architectures.decoder.stored_layers(outcome) and not architectures.description.describe(outcome)
    found: dict[str, dict[str, str | None]] = {formats.OWN: dict.fromkeys(formats.DENSE) if dense else {}}
    for name in formats.names()[1:]:
        format = formats.find(name)
        with contextlib.suppress(LayerError):
            format.check_shapes(outcome)
            found[name] = {engine: format.refusal_of_model(engine, outcome) for engine in format.engines}
    return found


def _kernels(name: str, method: type, device: str) -> list[str]:
    """The kernel of a 512 x 512 layer in bf16, for each bit width where the method has several."""
    import torch

    linear = torch.nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)
    widths = typing.get_args(typing.get_type_hints(method).get("bits"))
    found = []
    for text in [f"{name}(bits={bits})" for bits in widths] or [name]:
        instance = Recipe.parse(text).steps[0].method
        if instance.engine is not None:
            return [f"those of {instance.engine}, which does it while it loads a model"]
        if not isinstance(instance, LayerMethod):
            return ["of the layers as they are"]
        try:
            layer = instance.compress_linear(linear, None)
            kernel = "dense" if isinstance(layer, torch.nn.Linear) else layer.kernel_name(device)
        except CompressionError as error:
            kernel = f"none here: {error}"
        found.append(f"{text} {kernel} on {device}")
    return found
