"""`python -m compression list`: methods; with `--formats`, what formats hold of each, and the engines that open it."""

import argparse
import contextlib
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import compression
from compression import CompressionError, Recipe, architectures, caches, devices
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


@dataclass(frozen=True)
class Opening:
    """Whether an engine opens what a format holds.

    Attributes:
        why: it does not; None where it does.
        on_gpu: whether it does so on a GPU alone.
    """

    why: str | None = None
    on_gpu: bool = False


def list_formats(options: argparse.Namespace) -> int:
    """For each method the formats that hold what it stores exactly, and which engine opens it there."""
    found = {text: holding(text) for text in spellings()}
    if options.json:
        entries = [
            {"recipe": text, "formats": {name: {engine: asdict(each) for engine, each in engines.items()}
                                         for name, engines in held.items()}}
            for text, held in found.items()
        ]  # fmt: skip
        print(json.dumps(entries, indent=1))
        return 0
    for text, held in found.items():
        print(f"{text}:")
        for format, engines in held.items():
            print(f"    {format}: {opening(engines)}")
            for why in filter(None, (each.why for each in engines.values())):
                print(f"        {why}")
    for name in formats.read_only():
        print(f"{name}: read, not written; take {formats.find(name).instead}")
    return 0


def opening(engines: Mapping[str, Opening]) -> str:
    """The engines that open it, in words.

    >>> opening({"vllm": Opening(on_gpu=True), "transformers": Opening(why="none")})
    'vllm (GPU)'
    """
    names = [f"{name} (GPU)" if each.on_gpu else name for name, each in engines.items() if each.why is None]
    return ", ".join(names) or "this package"


def spellings() -> Iterator[str]:
    """Every built-in method in the settings that decide which formats hold the result, as recipes."""
    for name in built_in():
        yield from spellings_of(name)


def spellings_of(name: str) -> Iterator[str]:
    """One method: with each number of bits, symmetric or not, each type, and in each of its `variants`."""
    method = built_in()[name]
    types = typing.get_type_hints(method)
    settings = [f"{field}={each}" for field in ("bits", "type") for each in typing.get_args(types.get(field))]
    if "symmetric" in types:
        settings = [each for plain in settings for each in (plain, f"{plain},symmetric=true")]
    for each in dict.fromkeys((*settings, *method.variants)) or [""]:
        yield f"{name}({each})" if each else name


def holding(recipe: str, base: str = "reference") -> dict[str, dict[str, Opening]]:
    """The formats that hold what a recipe makes of a base, as far as shapes tell, and whether each engine opens it.

    Raises:
        CompressionError: the recipe cannot be.
    """
    steps = Recipe.parse(recipe)
    if steps.on_load is not None:
        method = steps.on_load.method
        opening = holding(steps.exported.text, base)[formats.OWN]
        return {formats.OWN: {method.engine: Opening(on_gpu=method.needs_gpu)} if method.engine in opening else {}}
    needs = {need for step in steps.steps for need in step.method.info.needs}
    given = {"teacher": "self"} if "teacher" in needs else {}
    outcome = compression.plan(base, steps, **given).outcome
    layers = architectures.decoder.stored_layers(outcome)
    changed = layers or architectures.description.describe(outcome) or caches.replaying.policy_of(outcome)
    dense = not changed
    found = {formats.OWN: dict.fromkeys(formats.DENSE, Opening()) if dense else {}}
    for name in formats.names()[1:]:
        format = formats.find(name)
        with contextlib.suppress(LayerError):
            format.check_shapes(outcome)
            found[name] = {
                engine: Opening(why) if (why := format.refusal_of_model(engine, outcome)) else
                Opening(on_gpu=format.needs_gpu(engine, layers.values()))
                for engine in format.engines
            }  # fmt: skip
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
