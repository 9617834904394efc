"""The registry of methods: declarations, parameters and lookup.

A method is a frozen, keyword-only dataclass under `@method(name)` in a module of `compression.methods`.
Nothing is listed twice: the families are searched on first use. Declarations import no torch, kernels do, late.
"""

import dataclasses
import difflib
import importlib
import json
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from compression.errors import LayerError, RecipeError

NAME = re.compile(r"[a-z][a-z0-9_]*")
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_./+]*|[0-9]+:[0-9]+")  # the latter: patterns n:m
CONSTANTS = {"true": True, "false": False, "none": None}

State = Literal["dense", "packed", "sparse"]


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """What the runner must know about a method before it runs.

    Attributes:
        name: how recipes spell it.
        aliases: the other spellings; the canonical text never holds one.
        family: the package that it lives in.
        kind: "block" methods see one decoder block at a time, "model" methods the whole model.
        needs: any of "calibration", "teacher", "training", "bitsandbytes"; what only some settings need is not among
            them.
        takes: the states of a model that the method accepts; a packed model is dequantized before any other.
        leaves: the state in which the method leaves the model, "sparse" after pruning, however that is stored; None:
            the one in which it took it.
        keeps_zeros: whether a weight that is exactly zero stays zero; else no pruning may come before.
        summary: the first line of the class's docstring.
    """

    name: str
    aliases: tuple[str, ...]
    family: str
    kind: Literal["block", "model"]
    needs: tuple[str, ...]
    takes: tuple[State, ...]
    leaves: State | None
    keeps_zeros: bool
    summary: str


class Method:
    """Base of all methods; `info` is set by `@method`.

    A block method defines `compress_block(block, inputs, context)`, a model method `apply(model, context)`, which
    returns the model.
    """

    info: ClassVar[MethodInfo]

    def __post_init__(self) -> None:
        """Raise RecipeError if parameters are out of their range or contradict each other."""

    @property
    def whole(self) -> bool:
        """Whether it is `apply` that is called, on the whole model at once; by parameters, for a method with both."""
        return self.info.kind == "model"

    @property
    def calibration(self) -> tuple[int, int] | None:
        """(samples, tokens of each) of the calibration text that the method reads as it is set, None for none."""
        return None

    @property
    def trains(self) -> bool:
        """Whether the method, as it is set, trains on that text; documents then end as models are trained to see it."""
        return "training" in self.info.needs

    @property
    def teacher(self) -> bool:
        """Whether the method, as it is set, learns from a teacher; it then has a field `allow_vocab_mismatch`."""
        return "teacher" in self.info.needs

    @property
    def downstream(self) -> bool:
        """Whether the method, as it is set, trains on the examples of a downstream task."""
        return False

    def reshape(self, model: Any) -> Any:
        """For model methods: a model without weights in the shape in which `apply` leaves one of its shape.

        Raises:
            LayerError: its shapes forbid the method; called before any work.
        """
        return model


class LayerwiseMethod(Method):
    """A block method that treats every linear layer by itself: subclasses define `compress_linear`."""

    def check_layer(self, in_features: int, out_features: int) -> None:
        """Raise LayerError if a layer of this shape cannot be taken; called for all layers before any work."""

    def compress_linear(self, linear: Any, context: Any) -> Any:
        """The layer that takes the place of `linear` (a torch.nn.Linear), which itself stays as it is."""
        raise NotImplementedError

    def compress_block(self, block: Any, inputs: Any, context: Any) -> None:
        """Replace every linear of a `compression.architectures.decoder.Block`; one report entry for each."""
        from compression.architectures.decoder import as_linear
        from compression.checkpoints.artefact import LEFT_ALONE, LayerReport

        for name, stored in block.linears():
            method = context.step.for_layer(name)
            if method is None:
                context.report.append(LayerReport(name, "kept", LEFT_ALONE))
                continue
            linear = as_linear(stored)
            try:
                layer = method.compress_linear(linear, context)
            except LayerError as error:
                raise LayerError(f"{name}: {error}") from error
            block.replace(name, layer)
            context.report.append(LayerReport(name, "replaced", method.describe(linear, layer)))

    def describe(self, linear: Any, layer: Any) -> str:
        """What became of a linear layer, for the report."""
        stored = getattr(layer, "weight_part", None)
        return spell(self) + ("" if stored is None else f", {stored.words}, kernel {layer.kernel_name()}")


@dataclass(frozen=True, kw_only=True)
class Quantizer(LayerwiseMethod):
    """A layerwise method that packs weights: the linears of the blocks, with `embeddings=8` also those around them."""

    embeddings: Literal[16, 8] = 16  # bits of embeddings and head; 16: as the base stores them


class CalibratedMethod(LayerwiseMethod):
    """A block method that reads the inputs of each linear.

    Linears that read the same input share what is measured of it. Subclasses are dataclasses with the fields below.
    """

    samples: int  # of calibration text
    sequence_length: int  # tokens of each
    damp: float = 0.0  # share of the mean of the Hessian's diagonal that is added to it, where there is a Hessian

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp <= 1:
            raise RecipeError(f"{self.info.name}(damp={self.damp}): allowed are 0 to 1; the paper takes 0.01")
        check_samples(self)

    @property
    def calibration(self) -> tuple[int, int]:
        """(samples, tokens of each): one run over the text serves all layers."""
        return self.samples, self.sequence_length

    @property
    def fits_hessian(self) -> bool:
        """Whether weights are fitted to the inputs by their whole Hessian, which needs many more tokens than inputs."""
        return False

    def observer(self, cols: int, device: Any) -> Any:
        """What sums up inputs (..., cols) by `add`, and has the sum as its `value()`; their Hessian."""
        from compression.numeric.rounding import Hessian

        return Hessian(cols, device)

    def output_error(self, weight: Any, changed: Any, seen: Any) -> float:
        """The relative squared error of the outputs on what the observer has seen; weights fp32 (rows, cols)."""
        from compression.numeric.rounding import relative_error

        return relative_error(weight, changed, seen)

    def transform(self) -> Any:
        """The `numeric.channel_scales.Scaling` of the inputs beforehand, or None to leave them as they are."""
        return None

    def compress_stack(self, block: Any, layers: Any, seen: Any, note: str) -> None:
        """Replace `calibration.blockwise.Layer`s of a block, which read the same input and have these settings."""
        raise NotImplementedError

    def compress_block(self, block: Any, inputs: Any, context: Any) -> None:
        from compression.calibration import blockwise

        blockwise.compress(block, inputs, context)


class CalibratedQuantizer(Quantizer, CalibratedMethod):
    """Rounding to an affine grid by the inputs' Hessian.

    Linears that read the same input and have the same settings are rounded as one matrix. Subclasses define a `grid`, a
    rounding (`round`) and, if there is one, the `transform` before it.
    """

    group_size: int  # inputs that share a scale; -1: one scale per output channel
    backend: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size != -1 and self.group_size < 8:
            raise RecipeError(f"{self.info.name}(group_size={self.group_size}): allowed are -1 (per channel) and 8 or "
                              "more")  # fmt: skip

    def grid(self) -> Any:
        """The `compression.numeric.grids.AffineGrid` of the stored weights."""
        raise NotImplementedError

    def check_layer(self, in_features: int, out_features: int) -> None:
        from compression.numeric.grids import check_group

        check_group(in_features, self.grid().group_size)

    def compress_linear(self, linear: Any, context: Any) -> Any:
        """What a linear of which no input is known becomes: rounded to nearest. Tells the kernel that it will get."""
        from compression.layers.codes import packed_linear

        return packed_linear(linear.weight, linear.bias, self.grid(), backend=self.backend)

    def round(self, weight: Any, hessian: Any, dtype: Any) -> Any:
        """A `compression.numeric.rounding.Rounded` of a weight, fp32 (rows, cols); `dtype` is that of stored scales."""
        raise NotImplementedError

    def compress_stack(self, block: Any, layers: Any, seen: Any, note: str) -> None:
        from compression.calibration import blockwise

        blockwise.round_to_grid(block, self, layers, seen, note)


def check_samples(instance: Any) -> None:
    """Raise RecipeError unless a method's `samples` and `sequence_length` can be counts of text."""
    for name in ("samples", "sequence_length"):
        if getattr(instance, name) < 1:
            raise RecipeError(f"{instance.info.name}({name}={getattr(instance, name)}): must be at least 1")


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
) -> Callable[[type], type]:
    """Register a frozen dataclass as the method `name`.

    Raises:
        RecipeError: the name or an alias is taken (both modules are named), or the class is not of the right form.
    """

    def register(cls: type) -> type:
        parameters = getattr(cls, "__dataclass_params__", None)
        keyword_only = parameters is not None and all(field.kw_only for field in dataclasses.fields(cls))
        if not (issubclass(cls, Method) and keyword_only and parameters.frozen):
            raise RecipeError(f"{cls.__module__}.{cls.__name__} must be a frozen, keyword-only dataclass on Method")
        kind = "block" if hasattr(cls, "compress_block") else "model" if hasattr(cls, "apply") else None
        if kind is None:
            raise RecipeError(f"method {name!r} has neither compress_block nor apply; it needs one of them")
        for spelling in (name, *aliases):
            if not NAME.fullmatch(spelling) or spelling == "fp16":
                raise RecipeError(f"method name {spelling!r} must be lower case letters, digits and _, and not fp16")
            owner = METHODS.get(spelling) or METHODS.get(_ALIASES.get(spelling, ""))
            if owner is not None:
                raise RecipeError(
                    f"method name {spelling!r} is declared twice: in {owner.__module__} and in {cls.__module__}"
                )
        module = cls.__module__.split(".")
        cls.info = MethodInfo(
            name=name,
            aliases=tuple(aliases),
            family=module[2] if module[:2] == ["compression", "methods"] else module[0],
            kind=kind,
            needs=tuple(needs),
            takes=tuple(takes),
            leaves=leaves,
            keeps_zeros=keeps_zeros,
            summary=(cls.__doc__ or "").strip().split("\n")[0],
        )
        METHODS[name] = cls
        _ALIASES.update(dict.fromkeys(aliases, name))
        return cls

    return register


def discover() -> dict[str, type[Method]]:
    """All methods by name: imports every module of `compression.methods` once."""
    global _discovered
    if not _discovered:
        package = importlib.import_module("compression.methods")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
        _discovered = True
    return dict(sorted(METHODS.items()))


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
