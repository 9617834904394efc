"""The four units that methods are: what each of them is given tells what the engine may stream, keep and share out.

    LayerMethod     compress_linear(linear, context) -> layer       each linear layer by itself
    BlockMethod     compress_block(block, seen, context)            a decoder block, and what its layers see of text
    ModelMethod     compress_model(decoder, seen, context)          the whole model, and its residual stream
    TrainingMethod  apply(model, context) -> model                  the whole model, by gradients

Layer and block methods are taken from block to block: they stream, and resume behind a block. A method is a frozen
dataclass of its parameters on one of these, declared by `@method(name)`. `apply_block` and `apply` are what the engine
calls; they check weights, name the layer in errors, and report what became of each layer.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compression import architectures, calibration
from compression.errors import LayerError, RecipeError
from compression.layers.report import LEFT_ALONE, LayerReport
from compression.recipes.registry import Method, method, spell
from compression.workers import ALONE, Workers, dealt

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compression.architectures.decoder import Block, Decoder
    from compression.calibration.capture import Seen, Stream
    from compression.checkpoints.base import BaseSource
    from compression.recipes.recipe import Step
    from compression.training.downstream import Downstream

__all__ = ["BlockMethod", "Context", "LayerMethod", "ModelMethod", "OnLoadMethod", "Progress", "Quantizer",
           "TrainingMethod", "check_samples", "method"]  # fmt: skip

Progress = Callable[[int, int, str], None]

PLACES = ("weight_part", "input_part", "output_part")
NOT_FINITE = "the weight has NaN or infinite values: the checkpoint is damaged, or was saved in too narrow a dtype"


@dataclass
class Context:
    """What a method may use while it runs.

    Attributes:
        step: the step that runs, with its settings per layer; None where stored layers are made dense.
        device: where the model is.
        seed: for everything random; methods make generators of their own from it.
        progress: called with (done, total, what).
        report: methods add one entry per layer.
        ids: token ids of calibration text, int64 (samples, length), on the device; None for a step that reads none.
        tokenizer: of the base; None if it has none.
        teacher: the base that a step learns from; None for a step that needs none.
        open_teacher: gives the model of that base after a recipe that reads no data, by its text.
        folder: where training keeps what later runs and those that go on after a kill can use.
        downstream: the task whose examples a step trains on; None for a step that trains on none.
        pruned: whether a step before made zeros, which are to stay.
        trained: runs of training that the step took; what they left in the folder is of no use once its result is kept.
        workers: the processes that share the samples of the text and the layers of a block; this one alone, mostly.
    """

    step: "Step | None"
    device: str
    seed: int
    progress: Progress
    report: list[LayerReport] = field(default_factory=list)
    ids: "Tensor | None" = None
    tokenizer: Any = None
    teacher: "BaseSource | None" = None
    open_teacher: "Callable[[str], nn.Module] | None" = None
    folder: Path | None = None
    downstream: "Downstream | None" = None
    pruned: bool = False
    trained: list[Any] = field(default_factory=list)
    workers: Workers = ALONE

    @property
    def calibration_tokens(self) -> int:
        """Tokens of calibration text that were read."""
        return 0 if self.ids is None else self.ids.numel()

    def kept(self, name: str, why: str = LEFT_ALONE) -> None:
        """Report that a layer stays as it is."""
        self.report.append(LayerReport(name, "kept", why))

    def replaced(self, name: str, by: str) -> None:
        """Report what took the place of a layer."""
        self.report.append(LayerReport(name, "replaced", by))


class LayerMethod(Method):
    """Treats every linear layer by itself: subclasses define `compress_linear`, or `fit_linear` where they measure."""

    unit = "layer"
    per_layer: ClassVar[bool] = True

    @property
    def measured(self) -> "calibration.capture.MakeObserver | None":
        """Makes the observer of the inputs of each layer; None for a method that, as it is set, reads none."""
        return None

    def check_layer(self, in_features: int, out_features: int) -> None:
        """Raise LayerError if a layer of this shape cannot be taken; called for all layers before any work."""

    def in_block(self, name: str, block: "Block") -> "LayerMethod":
        """The method for the layer of that full name; itself, unless the place of the layer decides on its settings.

        Calibrated methods are not asked: their layers that read the same input are treated together.
        """
        return self

    @abstractmethod
    def compress_linear(self, linear: "nn.Linear", context: Context) -> Any:
        """The layer that takes the place of `linear`, which itself stays as it is."""

    def fit_linear(self, linear: "nn.Linear", inputs: Any, context: Context) -> Any:
        """As `compress_linear`, with the value of the layer's observer."""
        return self.compress_linear(linear, context)

    def apply_block(self, block: "Block", seen: "Seen | None", context: Context) -> None:
        """Replace every linear of a block; one report entry for each."""
        assert context.step is not None
        inputs: dict[str, Any] = {}
        if self.measured is not None and seen is not None:
            for name, layer in block.linears():
                check_finite(name, layer)
            inputs = seen.inputs(self.measured)
        sizes = {name: layer.in_features * layer.out_features for name, layer in block.linears()}
        methods: dict[str, Any] = {name: context.step.for_layer(name) for name in sizes}
        taken = [name for name in sizes if methods[name] is not None]
        owners = dealt([sizes[name] for name in taken], context.workers.count)
        jobs = [
            partial(_compressed, block, name, methods[name].in_block(name, block), inputs.get(name), context)
            for name in taken
        ]
        results = context.workers.run(owners, jobs)
        for name in sizes:
            if methods[name] is None:
                context.kept(name)
                continue
            layer, words = next(results)
            block.replace(name, layer)
            context.replaced(name, words)

    def describe(self, linear: "nn.Linear", layer: Any) -> str:
        """What became of a linear layer, for the report."""
        return spell(self) + _stored_words(layer)


@dataclass(frozen=True, kw_only=True)
class Quantizer(LayerMethod):
    """A method that packs weights: the linears of the blocks, with `embeddings=8` also those around them."""

    embeddings: Literal[16, 8] = 16  # bits of embeddings and head; 16: as the base stores them


@dataclass(frozen=True, kw_only=True)
class BlockMethod(Method):
    """Treats a block at a time, by what its layers see of calibration text: subclasses define `compress_block`."""

    unit = "block"

    samples: int = 128  # of calibration text
    sequence_length: int = 512  # tokens of each sample

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)

    @property
    def calibration(self) -> tuple[int, int] | None:
        return self.samples, self.sequence_length

    @abstractmethod
    def compress_block(self, block: "Block", seen: "Seen", context: Context) -> None:
        """Change the layers of a block by edits and parts; `seen` runs the text through it whenever it is asked."""

    def shape_block(self, block: "Block") -> None:
        """For plans: put what `compress_block` stores into a block without weights, as far as shapes tell."""

    def apply_block(self, block: "Block", seen: "Seen", context: Context) -> None:
        """As `compress_block`; checks weights before, reports each layer behind. Quantizers of keys and values stay."""
        before = {name: (layer, _parts_of(layer)) for name, layer in block.linears()}
        norms = [(site.producer, site.producer.weight) for site in block.sites if site.row.of in ("norm", "latent")]
        for name, (layer, _) in before.items():
            check_finite(name, layer)
        with _naming(block.name), architectures.decoder.keeping_outputs(block):
            self.compress_block(block, seen, context)
        for name, layer in block.linears():
            if before[name][0] is layer and before[name][1] == _parts_of(layer):
                context.kept(name)
            else:
                seen_by = seen.routed.words(name.removeprefix(f"{block.name}."))
                context.replaced(name, spell(self) + _stored_words(layer) + seen_by)
        changed = LayerReport("norms", "replaced", f"{spell(self)}: they take in what their readers make up for")
        if changed not in context.report and any(norm.weight is not weight for norm, weight in norms):
            context.report.append(changed)


class ModelMethod(Method):
    """Treats the whole model at once: subclasses define `compress_model`, or `apply` if they report by themselves."""

    unit = "model"

    def compress_model(self, decoder: "Decoder", seen: "Stream | None", context: Context) -> None:
        """Change the model by edits and parts; `seen` has the residual stream on calibration text, if any is read."""
        raise NotImplementedError

    def reshape(self, model: "nn.Module") -> "nn.Module":
        """A model without weights in the shape in which `apply` leaves one of its shape.

        Raises:
            LayerError: its shapes forbid the method; called before any work.
        """
        return model

    def apply(self, model: "nn.Module", context: Context) -> "nn.Module":
        """The changed model, which may be another; one report entry for each linear layer.

        Raises:
            LayerError: a weight is not finite, or a layer cannot be changed so.
        """
        decoder = architectures.decoder.Decoder(model)
        before = {name: layer for block in decoder.blocks for name, layer in block.linears()}
        for name, layer in before.items():
            check_finite(name, layer)
        outside = {"norms": decoder.norm.weight, **{name: decoder.model.get_submodule(name).weight
                   for name in (decoder.row.embeddings, decoder.row.head)}}  # fmt: skip
        self.compress_model(
            decoder, None if context.ids is None else calibration.capture.Stream(model, context.ids), context
        )
        for block in decoder.blocks:
            for name, layer in block.linears():
                if before[name] is layer:
                    context.kept(name)
                else:
                    sizes = f"{layer.out_features} x {layer.in_features}"
                    context.replaced(name, f"{spell(self)}, {sizes}{_stored_words(layer)}")
        for name, weight in outside.items():
            now = decoder.norm if name == "norms" else decoder.model.get_submodule(name)
            if now.weight is not weight:
                context.replaced(name, f"{spell(self)}, {' x '.join(map(str, now.weight.shape))}")
        return decoder.model


class TrainingMethod(ModelMethod):
    """Trains the whole model: subclasses define `apply`."""

    unit = "training"

    def reshape(self, model: "nn.Module") -> "nn.Module":
        """Raises LayerError: losses cannot be computed on the model."""
        architectures.decoder.check_trainable(model)
        return model

    @property
    def trains(self) -> bool:
        return True


class OnLoadMethod(ModelMethod):
    """What an engine does while it loads a model: the last step of a recipe, which this package cannot take itself."""

    @property
    def needs_gpu(self) -> bool:
        """Whether the engine does it on GPUs alone."""
        raise NotImplementedError

    @property
    @abstractmethod
    def quantization(self) -> str:
        """What the engine is told to do."""

    def reshape(self, model: "nn.Module") -> "nn.Module":
        """Raises RecipeError: there is nothing that this package could store or measure."""
        raise RecipeError(f"{spell(self)} is what {self.engine} makes of a model while it loads it: measure it with "
                          f"pytest bench --runtime {self.engine}")  # fmt: skip

    def apply(self, model: "nn.Module", context: Context) -> "nn.Module":
        """As `reshape`."""
        return self.reshape(model)


def _compressed(block: "Block", name: str, by: Any, inputs: Any, context: Context) -> "tuple[nn.Module, str]":
    """What the linear layer of that name becomes, and words for the report."""
    stored = block.layer(name.removeprefix(f"{block.name}."))
    linear = architectures.decoder.as_linear(stored)
    with _naming(name):
        layer = by.fit_linear(linear, inputs, context)
    words = by.describe(linear, layer)
    return architectures.decoder.with_output(layer, getattr(stored, "output_part", None)), words


def check_samples(instance: Any) -> None:
    """Raise RecipeError unless a method's `samples` and `sequence_length` can be counts of text."""
    for name in ("samples", "sequence_length"):
        if getattr(instance, name) < 1:
            raise RecipeError(f"{instance.info.name}({name}={getattr(instance, name)}): must be at least 1")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of a layer begin with its name, or that of its block."""
    try:
        yield
    except LayerError as error:
        raise error if str(error).startswith(name) else LayerError(f"{name}: {error}") from error


def check_finite(name: str, layer: Any) -> None:
    weight = layer.weight if hasattr(layer, "weight") else None
    if weight is not None and weight.is_floating_point() and not weight.isfinite().all():
        raise LayerError(f"{name}: {NOT_FINITE}")


def _parts_of(layer: Any) -> tuple[Any, ...]:
    """What stands in the places of a layer that has some."""
    return tuple(getattr(layer, place, None) for place in PLACES)


def _stored_words(layer: Any) -> str:
    """How a layer that is no dense one is stored and multiplied."""
    weight, entering, leaving = (getattr(layer, place, None) for place in PLACES)
    words = [each.words for each in (weight, entering, leaving) if each is not None]
    return "".join(f", {each}" for each in [*words, f"kernel {layer.kernel_name()}"]) if words else ""
