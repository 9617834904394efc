"""Pages made from the registries: methods with their parameters, metrics with what the gate allows them."""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from bench.metrics import Metric, all_metrics
from compression.commands.listing import holding, opening, spellings_of
from compression.recipes.registry import build, built_in, spell_value
from generator.markdown import joined, page, plain, prose, table

ROOT = Path(__file__).parents[2]
BASELINES = ROOT / "baselines" / "reference"
SHOWN = "The methods at a glance"  # heading of the table that README shows
TWELVE = ("awq", "gptq", "hqq", "kd", "llm_int8", "magnitude", "nf4", "p", "rtn", "sparsegpt", "structured", "wanda")
FAMILIES = {
    "quantization": "Quantization",
    "pruning": "Pruning",
    "distillation": "Distillation and training",
    "low_rank": "Low rank",
}


# --- Methods ---------------------------------------------------------------------------------------------------------


def methods_page() -> str:
    """Every method with its parameters: type, default, meaning."""
    found = built_in()
    families = dict.fromkeys([*FAMILIES, *(cls.info.family for cls in found.values())])
    parts = []
    for family in families:
        members = [cls for cls in found.values() if cls.info.family == family]
        if members:
            parts += [f"## {FAMILIES.get(family, family)}", *(_method(cls) for cls in members)]
    return page(
        "Methods",
        "A recipe names one or more of these methods and joins them with `-`: `nf4`, `rtn(bits=3,group_size=64)`, "
        "`p-kd-nf4`. `fp16` is the uncompressed checkpoint. See [Recipes](../guides/your-model.md#recipes) for the "
        "grammar and [Add a method](../extend/a-method.md) for how to write one.",
        f"## {SHOWN}",
        "Perplexity on the embedded reference, with default parameters, as recorded in `baselines/reference/`. Lower "
        "is better.",
        at_a_glance(["fp16", *TWELVE]),
        "## Further methods",
        at_a_glance([name for name in found if name not in TWELVE]),
        *parts,
    )


def at_a_glance(names: Iterable[str]) -> str:
    """One line per method that has a baseline under its default parameters: what it does, and its perplexity."""
    rows, known = [], built_in()
    for name in names:
        if (value := _perplexity(name)) is not None:
            said = plain(known[name].info.summary) if name in known else "The uncompressed checkpoint."
            rows.append((f"`{name}`", said, value))
    return table(("Method", "What it does", "Perplexity"), rows)


def recorded(recipe: str, metric: str) -> dict[str, Any] | None:
    """The recorded row of a metric in the baseline of a recipe on the reference; of timings, on the first device."""
    path = BASELINES / f"{recipe}.json"
    if not path.exists():
        return None
    written = json.loads(path.read_text(encoding="utf-8"))
    sections = [written, *(written["devices"][name] for name in sorted(written["devices"]))]
    rows = [row for section in sections for key, row in section["rows"].items() if key.partition("[")[0] == metric]
    return rows[0] if rows else None


def _perplexity(recipe: str) -> str | None:
    row = recorded(recipe, "quality.perplexity")
    return None if row is None else f"{row['value']:.3f}"


_UNITS = {
    "layer": "one linear layer at a time, block by block",
    "block": "one decoder block at a time",
    "model": "the whole model",
    "training": "the whole model, which it trains",
}


def _method(cls: type) -> str:
    info = cls.info
    names = ", ".join(f"`{alias}`" for alias in info.aliases)
    facts = [
        f"Works on {_UNITS[build(info.name, {}).unit]}.",
        f"Needs: {', '.join(info.needs) or 'nothing besides the checkpoint'}.",
        f"Takes {' or '.join(info.takes)} weights; leaves "
        f"{'them as they were' if info.leaves is None else f'{info.leaves} weights'}.",
        "" if info.keeps_zeros else "Does not keep zeros, so it is refused after pruning.",
        f"Also spelled {names}." if names else "",
        f"Paper: {info.paper}." if info.paper else "",
    ]
    fields = parameters(cls)
    listed = table(("Parameter", "Type", "Default", "Meaning"), fields) if fields else "It has no parameters."
    return joined([f"### {info.name}", prose(inspect.getdoc(cls)), " ".join(filter(None, facts)), listed,
                   formats_of(info.name)])  # fmt: skip


def formats_of(name: str) -> str:
    """Which formats hold a method's results exactly, and the engines that open them; recipes alike share a line."""
    alike: dict[str, list[str]] = {}
    for recipe in spellings_of(name):
        held = holding(recipe)
        alike.setdefault("; ".join(f"{format}: {opening(engines)}" for format, engines in held.items()), []).append(
            recipe
        )
    rows = [(", ".join(f"`{each}`" for each in recipes), said) for said, recipes in alike.items()]
    return table(("Recipe", "Formats that hold it, and the engines that open it"), rows)


def parameters(cls: type) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of every parameter; the meaning is the comment behind the field."""
    hints, comments = typing.get_type_hints(cls), _comments(cls)
    return [
        (
            f"`{field.name}`",
            _type(hints[field.name]),
            "required" if field.default is dataclasses.MISSING else f"`{spell_value(field.default)}`",
            plain(comments.get(field.name, "")),
        )
        for field in dataclasses.fields(cls)
    ]


def _type(hint: Any) -> str:
    """A type as recipes spell its values."""
    if typing.get_origin(hint) is Literal:
        return _or(f"`{spell_value(each)}`" for each in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _or(map(_type, typing.get_args(hint)))
    return {int: "integer", float: "number", bool: "`true` or `false`", str: "text", type(None): "`none`"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _or(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _comments(cls: type) -> dict[str, str]:
    """The comment behind each field, that of the class nearest to `cls` that has one."""
    found: dict[str, str] = {}
    for each in cls.__mro__:
        if each.__module__ == "builtins":
            continue
        try:
            source = textwrap.dedent(inspect.getsource(each))
        except (OSError, TypeError):
            continue
        words = {
            token.start[0]: token.string.removeprefix("#").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and not token.string.startswith(("# fmt", "# type", "# noqa"))
        }
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in words:
                found.setdefault(node.target.id, words[node.end_lineno])
    return found


# --- Metrics ---------------------------------------------------------------------------------------------------------

GROUPS = {
    "efficiency": "Efficiency",
    "quality": "Quality",
    "rag": "RAG",
    "judge": "Judging",
    "recovery": "Recovery",
}
KINDS = {
    "timing": "compared on the same device only, by the tolerance and by the rounds",
    "memory": "compared on the same device only, by the tolerance and by the rounds",
    "counted": "compared exactly",
    "deterministic": "exact on the same device, torch and engine, elsewhere to 1e-3",
    "sampled": "compared by the tolerance, and item by item where items were recorded",
}


def metrics_page() -> str:
    """Every metric with unit, direction, tolerance and definition."""
    found = all_metrics()
    groups = dict.fromkeys([*GROUPS, *(each.group for each in found.values())])
    parts = []
    for group in groups:
        members = [each for each in found.values() if each.group == group]
        if members:
            parts += [f"## {GROUPS.get(group, group.capitalize())}", *(_metric(each) for each in members)]
    kinds = table(("Kind", "How the gate compares it"), [(f"`{name}`", what) for name, what in KINDS.items()])
    return page(
        "Metrics",
        "A row of results is one of these metrics with its parameters, such as "
        "`efficiency.decode_ms[batch=1,new_tokens=128]`. The [methodology](../methodology/index.md) says what each "
        "number means and does not mean. To write one, see [Add a metric](../extend/a-metric.md).",
        "The tolerance is how far a value may worsen before the gate fails: of the ratio to the uncompressed model "
        "where there is one, else of the value. `python -m bench calibrate-gate --write` replaces the tolerances of "
        "timings with measured ones.",
        kinds,
        *parts,
    )


def _metric(metric: Metric) -> str:
    facts = [
        ("Unit", plain(metric.unit)),
        ("Better", metric.better),
        ("Kind", f"`{metric.kind}`"),
        ("Read from", f"`{metric.of}`"),
        ("Tolerance", _tolerance(metric)),
    ]
    return joined([f"### {metric.name}", prose(inspect.getdoc(metric.function)), table(*_across(facts))])


def _across(facts: list[tuple[str, str]]) -> tuple[list[str], list[list[str]]]:
    return [name for name, _ in facts], [[value for _, value in facts]]


def _tolerance(metric: Metric) -> str:
    if metric.kind in ("counted", "deterministic"):
        if metric.kind == "counted":
            return "exact"
        least = f", at least {metric.dtype_floor:g}" if metric.dtype_floor else ""
        other = f"; {100 * metric.rel:g} %{least} in another dtype" if metric.rel else ""
        return f"exact, or 0.1 % on another device{other}"
    found = [f"{100 * metric.rel:g} %"]
    if metric.rel_absolute is not None:
        found.append(f"{100 * metric.rel_absolute:g} % of the value itself")
    if metric.floor:
        found.append(f"at least {metric.floor:g} {metric.unit}")
    return "; ".join(found)
