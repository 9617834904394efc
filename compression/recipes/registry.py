"""The registry of methods: declarations, parameters and lookup.

A method is a frozen, keyword-only dataclass under `@method(name)` in a module of `compression.methods`.
Nothing is listed twice: the families are searched on first use. Declarations import no torch, kernels do, late.
"""

import dataclasses
import difflib
import importlib
import importlib.metadata
import json
import pkgutil
import re
import sys
import types
import typing
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from compression.errors import RecipeError

NAME = re.compile(r"[a-z][a-z0-9_]*")
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_./+]*|[0-9]+:[0-9]+")  # the latter: patterns n:m
CONSTANTS = {"true": True, "false": False, "none": None}

GROUP = "compression.methods"  # of entry points by which other packages announce methods

State = Literal["dense", "packed", "sparse"]
Unit = Literal["layer", "block", "model", "training"]


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """What is known of a method before it runs.

    Attributes:
        name: how recipes spell it.
        aliases: the other spellings; the canonical text never holds one.
        family: the folder that it lives in, or what a method from outside says.
        needs: any of "calibration", "teacher", "training", "bitsandbytes"; what only some settings need is not among
            them.
        takes: the states of a model that the method accepts; a packed model is dequantized before any other.
        leaves: the state in which the method leaves the model, "sparse" after pruning, however that is stored; None:
            the one in which it took it.
        keeps_zeros: whether a weight that is exactly zero stays zero; else no pruning may come before.
        paper: where it comes from, e.g. "arXiv:2211.10438".
        summary: the first line of the class's docstring.
    """

    name: str
    aliases: tuple[str, ...]
    family: str
    needs: tuple[str, ...]
    takes: tuple[State, ...]
    leaves: State | None
    keeps_zeros: bool
    paper: str | None
    summary: str


class Method(ABC):
    """What the registry holds; methods are subclasses of the units in `compression.methods.base`.

    Attributes:
        info: set by `@method`.
        unit: what the engine hands it at a time; by parameters, for a method that can be of several.
        per_layer: whether recipes may give layers settings of their own.
        variants: settings, as recipes spell them, that decide which formats hold the result; `bits`, `symmetric` and
            `type` need not be named.
        engine: the engine that does it while it loads the model; None for what this package does.
    """

    info: ClassVar[MethodInfo]
    unit: Unit | None = None
    per_layer: ClassVar[bool] = False
    variants: ClassVar[tuple[str, ...]] = ()
    engine: ClassVar[str | None] = None

    def __post_init__(self) -> None:  # noqa: B027 - most have nothing to check
        """Raise RecipeError if parameters are out of their range or contradict each other."""

    @property
    def calibration(self) -> tuple[int, int] | None:
        """(samples, tokens of each) of the calibration text that the method reads as it is set, None for none."""
        return None

    @property
    def trains(self) -> bool:
        """Whether the method, as it is set, trains on that text; documents then end as models are trained to see it."""
        return False

    @property
    def teacher(self) -> bool:
        """Whether the method, as it is set, learns from a teacher; it then has a field `allow_vocab_mismatch`."""
        return "teacher" in self.info.needs

    @property
    def downstream(self) -> bool:
        """Whether the method, as it is set, trains on the examples of a downstream task."""
        return False


METHODS: dict[str, type[Method]] = {}
_ALIASES: dict[str, str] = {}
_discovered = False


def method(
    name: str,
    *,
    aliases: Iterable[str] = (),
    needs: Iterable[str] = (),
    takes: Iterable[State] = ("dense",),
    leaves: State | None = "packed",
    keeps_zeros: bool = True,
    paper: str | None = None,
    family: str | None = None,
) -> Callable[[type], type]:
    """Register a class as the method `name`; one that is no dataclass yet is made a frozen, keyword-only one.

    Raises:
        RecipeError: the name or an alias is taken (both modules are named), or the class is not of the right form.
    """

    def register(cls: type) -> type:
        if "__dataclass_params__" not in vars(cls) and issubclass(cls, Method):
            cls = dataclass(frozen=True, kw_only=True)(cls)
        parameters = getattr(cls, "__dataclass_params__", None)
        keyword_only = parameters is not None and all(field.kw_only for field in dataclasses.fields(cls))
        if not (issubclass(cls, Method) and keyword_only and parameters.frozen):
            raise RecipeError(f"{cls.__module__}.{cls.__name__} must be a frozen, keyword-only dataclass on Method")
        if cls.unit is None:
            raise RecipeError(f"method {name!r} is no unit of work: make it a LayerMethod, BlockMethod, ModelMethod or "
                              "TrainingMethod")  # fmt: skip
        if cls.__abstractmethods__:
            raise RecipeError(f"method {name!r} lacks {', '.join(sorted(cls.__abstractmethods__))}")
        if reserved := {"layers", "keep"} & {field.name for field in dataclasses.fields(cls)}:
            raise RecipeError(
                f"method {name!r}: every step has a parameter {min(reserved)} already; choose another name"
            )
        for spelling in (name, *aliases):
            if not NAME.fullmatch(spelling) or spelling == "fp16":
                raise RecipeError(f"method name {spelling!r} must be lower case letters, digits and _, and not fp16")
            owner = METHODS.get(spelling) or METHODS.get(_ALIASES.get(spelling, ""))
            if owner is not None:
                raise RecipeError(
                    f"method name {spelling!r} is declared twice: in {owner.__module__} and in {cls.__module__}"
                )
        cls.info = MethodInfo(
            name=name,
            aliases=tuple(aliases),
            family=family or _family_of(cls.__module__),
            needs=tuple(needs),
            takes=tuple(takes),
            leaves=leaves,
            keeps_zeros=keeps_zeros,
            paper=paper,
            summary=(cls.__doc__ or "").strip().split("\n")[0],
        )
        METHODS[name] = cls
        _ALIASES.update(dict.fromkeys(aliases, name))
        return cls

    return register


def _family_of(module: str) -> str:
    """quantization of compression.methods.quantization.weight_only.nf4; of others the package that they are in."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["compression", "methods"] else parts[0]


def discover() -> dict[str, type[Method]]:
    """All methods by name: once, imports every module of `compression.methods`, and what other packages announce as
    entry points of that group.

    Raises:
        RecipeError: what a package announces cannot be imported; the message names it.
    """
    global _discovered
    if not _discovered:
        package = importlib.import_module(GROUP)
        for module in pkgutil.walk_packages(package.__path__, f"{GROUP}."):
            importlib.import_module(module.name)
        for point in importlib.metadata.entry_points(group=GROUP):
            try:
                point.load()
            except Exception as error:
                owner = point.dist.name if point.dist is not None else "a package"
                what = f"{owner} announces the method {point.name} = {point.value}, which cannot be imported"
                raise RecipeError(f"{what}: {type(error).__name__}: {error}; mend or uninstall {owner}") from error
        _discovered = True
    return dict(sorted(METHODS.items()))


def built_in() -> dict[str, type[Method]]:
    """The methods of this package alone, by name."""
    return {name: cls for name, cls in discover().items() if cls.__module__.startswith(f"{GROUP}.")}


def resolve(name: str) -> type[Method]:
    """The method class behind a name or an alias.

    Raises:
        RecipeError: no such method; the message holds the near misses and all names.
    """
    methods = discover()
    found = methods.get(_ALIASES.get(name, name))
    if found is None:
        raise RecipeError(f"unknown method {name!r}{_hint(name, [*methods, *_ALIASES, 'fp16'])}; methods: "
                          f"{', '.join(['fp16', *methods])}; aliases: "
                          f"{', '.join(f'{k} = {v}' for k, v in sorted(_ALIASES.items()))}")  # fmt: skip
    return found


def build(name: str, parameters: Mapping[str, Any]) -> Method:
    """An instance of the method with checked parameters.

    Raises:
        RecipeError: unknown method or parameter, or a value of the wrong type or out of its range.
    """
    cls = resolve(name)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    checked = {}
    for key, value in parameters.items():
        if key not in fields:
            raise RecipeError(
                f"{name} has no parameter {key!r}{_hint(key, list(fields))}; "
                + (f"parameters: {', '.join(describe_parameters(cls))}" if fields else "it takes none")
            )
        checked[key] = _checked(value, hints[key], f"{name}({key}={value!r})")
    missing = [f.name for f in fields.values() if f.name not in checked
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]  # fmt: skip
    if missing:
        raise RecipeError(f"{name} needs the parameter {missing[0]!r}; parameters: "
                          f"{', '.join(describe_parameters(cls))}")  # fmt: skip
    return cls(**checked)


def non_default(instance: Method) -> dict[str, Any]:
    """The parameters of a method that differ from their defaults, in the order of declaration."""
    return {
        field.name: getattr(instance, field.name)
        for field in dataclasses.fields(instance)  # type: ignore[arg-type]
        if getattr(instance, field.name) != field.default
    }


def describe_parameters(cls: type[Method]) -> list[str]:
    """`name=default` of every parameter, with the allowed values where they are a closed set."""
    hints = typing.get_type_hints(cls)
    described = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        allowed = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is Literal else ()
        default = "" if field.default is dataclasses.MISSING else f"={spell_value(field.default)}"
        described.append(f"{field.name}{default}" + (f" ({'|'.join(map(spell_value, allowed))})" if allowed else ""))
    return described


def spell(instance: Method) -> str:
    """A method as recipes write it, defaults left out."""
    return spell_call(instance.info.name, non_default(instance))


def spell_call(name: str, parameters: Mapping[str, Any]) -> str:
    """`name(key=value,...)`, or the name alone."""
    pairs = ",".join(f"{key}={spell_value(value)}" for key, value in parameters.items())
    return f"{name}({pairs})" if pairs else name


def spell_value(value: Any) -> str:
    """One value as recipes write it."""
    for word, constant in CONSTANTS.items():
        if value is constant:
            return word
    if isinstance(value, str):
        return value if WORD.fullmatch(value) and value not in CONSTANTS else json.dumps(value)
    return json.dumps(value, separators=(",", ":")) if isinstance(value, Mapping) else repr(value)


def _hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, or RecipeError. An int serves as a float; a bool is no int."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if not any(value == a and type(value) is type(a) for a in allowed):
            raise RecipeError(f"{where}: allowed are {', '.join(map(spell_value, allowed))}")
        return value
    if origin in (types.UnionType, typing.Union):
        for option in typing.get_args(hint):
            try:
                return _checked(value, option, where)
            except RecipeError:
                continue
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not -sys.float_info.max <= value <= sys.float_info.max:  # an int can be beyond every float
            raise RecipeError(f"{where}: must be a finite number")
        return float(value)
    elif hint is type(None) and value is None:
        return None
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise RecipeError(f"{where}: expected {expected}, got {type(value).__name__}")
