"""The formats that a model is written in and opened from, by name; another package adds one with `register`.

Nothing here needs torch until a format is used.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression import architectures, checkpoints
from compression.errors import LayerError, RecipeError

OWN = "own"  # that of this package, which holds every kind of part
DENSE = ("transformers", "vllm")  # the engines that open a checkpoint of dense layers
ENGINES = ("vllm", "llama.cpp", "gptqmodel", "transformers")  # that open one of the formats here


@dataclass(frozen=True)
class Written:
    """What a format makes of a model.

    Attributes:
        tensors: those of the format by name, given those of a piece of the model by the names of its state dict: of all
            of it, of what is outside its blocks, or of a block. Only the tensors of the piece have to be in the model.
            Raises LayerError where the format would change a weight.
        described: JSON by the name of its file, merged into that file where there is one (config.json).
    """

    tensors: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    described: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Format:
    """One way to write a whole model; subclasses have a `name` and what they can of the rest.

    Attributes:
        name: how it is asked for.
        engines: the other programs that open what is written, or some of it.
        last: the file without which nothing opens what is written.
        one_file: whether it is a single file, whose writing begins anew after a kill.
    """

    name: str
    engines: tuple[str, ...] = ()
    last: str = "config.json"
    one_file: bool = False

    def accepts(self, layer: Any) -> str | None:
        """Why the format has no place for a linear layer of the blocks (torch's, or a `layers.Linear`), or None."""
        raise NotImplementedError

    def check_shapes(self, model: Any) -> None:
        """Raise LayerError if the format cannot hold the model, as far as shapes and kinds tell."""
        for block in architectures.decoder.decoder_blocks(model):
            for name, layer in block.linears():
                if reason := self.accepts(layer):
                    raise LayerError(f"format {self.name} cannot hold {name}: {reason}")

    def check(self, model: Any) -> None:
        """Raise LayerError if the format cannot hold the model exactly; nothing is converted."""
        self.check_shapes(model)

    def check_tokenizer(self, tokenizer: Any, config: Any) -> None:
        """Raise LayerError if the format has no place for a tokenizer, or None, of a model of `config`."""

    def check_result(self, result: Any) -> None:
        """Raise LayerError if the format cannot hold a `Compressed`, its tokenizer included."""
        self.check(result.model)
        self.check_tokenizer(result.tokenizer, result.model.config)

    def write(self, model: Any, recipe: Any) -> Written:
        """How the model is written in this format; it may be without weights, and no value is looked at yet.

        Raises:
            LayerError: the format cannot hold it, as far as shapes and kinds tell.
        """
        raise NotImplementedError

    def filler(self, result: Any) -> Callable[[Path], None]:
        """What writes a `Compressed` into an empty folder; by default `write` in safetensors, and what goes beside.

        Raises:
            LayerError: the format cannot hold the result; nothing is written.
        """
        written = self.write(result.model, result.recipe)
        return checkpoints.output.tensor_filler(result, written.tensors(result.model.state_dict()), written.described)

    def piecewise_filler(self, result: Any, filling: Callable[[], Iterator[Any]]) -> Callable[[Path], None]:
        """The same of a model without weights; of formats of one file.

        Args:
            filling: goes through the pieces of the model, what is outside the blocks first, each of which has its
                tensors until the next is asked for (`pieces.Unread.filling`).

        Raises:
            LayerError: the format cannot hold the model, as far as shapes and kinds tell; what values tell comes later.
        """
        raise NotImplementedError

    def reads(self, folder: Path) -> bool:
        """Whether a folder, or a file, is of this format; only what describes it is looked at."""
        return False

    def source(self, folder: Path) -> Any:
        """The `BaseSource` of what `reads`."""
        return checkpoints.base.BaseSource(str(folder), "folder", folder)

    def stored_bytes(self, source: Any) -> int | None:
        """Bytes of all tensors in the files, None if the model that is read has them as they are stored."""
        return checkpoints.weights.bytes_in(source.files)

    def read(self, source: Any) -> tuple[Any, Any]:
        """The model of a `BaseSource`, a `pieces.Unread` of layers as they are stored, and the recipe that made it.

        Raises:
            CheckpointError: it is damaged.
        """
        raise NotImplementedError

    def refusal(self, engine: str, layers: Iterable[Any]) -> str | None:
        """Why one of `engines` does not open these linear layers in this format, or None."""
        return None

    def needs_gpu(self, engine: str, layers: Iterable[Any]) -> bool:
        """Whether an engine that opens these layers does so on a GPU alone."""
        return False

    def refusal_of_model(self, engine: str, model: Any) -> str | None:
        """`refusal` for all stored layers of a model."""
        return self.refusal(engine, architectures.decoder.stored_layers(model).values())

    def served(self, model: Any) -> list[str]:
        """A sentence on each engine: whether it opens a model in this format, or why not."""
        layers, said = list(architectures.decoder.stored_layers(model).values()), []
        for engine in self.engines:
            if why := self.refusal(engine, layers):
                said.append(f"{engine} does not open it: {why}")
            else:
                said.append(f"{engine} opens it{' on a GPU' if self.needs_gpu(engine, layers) else ''}")
        return said


_FORMATS: dict[str, Format | str] = {
    "gptq": "compression.checkpoints.formats.affine_formats:GPTQ",
    "awq": "compression.checkpoints.formats.affine_formats:AWQ",
    "compressed-tensors": "compression.checkpoints.formats.compressed_tensors_format:COMPRESSED_TENSORS",
    "bitsandbytes": "compression.checkpoints.formats.bitsandbytes_format:BITSANDBYTES",
    "gguf": "compression.checkpoints.formats.gguf_model:GGUF",
}
_READ_ONLY: dict[str, Format | str] = {
    "hqq": "compression.checkpoints.formats.read_only:HQQ",
    "torchao": "compression.checkpoints.formats.read_only:TORCHAO",
}


def register(format: Format) -> Format:
    """Add a format. Raises RecipeError if its name is taken."""
    if format.name == OWN or format.name in _FORMATS or format.name in _READ_ONLY:
        raise RecipeError(f"format {format.name!r} is registered already; choose another name")
    _FORMATS[format.name] = format
    return format


def unregister(name: str) -> None:
    """Take a format out again; for tests."""
    del _FORMATS[name]


def names() -> tuple[str, ...]:
    """Every format that a model can be written in, that of this package first."""
    return (OWN, *_FORMATS)


def read_only() -> tuple[str, ...]:
    """Every format that a model can be opened from and not written in."""
    return tuple(_READ_ONLY)


def find(name: str) -> Format:
    """The format of a name. Raises LayerError if there is none, or it is that of this package."""
    table = _READ_ONLY if name in _READ_ONLY else _FORMATS
    found = table.get(name)
    if found is None:
        raise LayerError(f"format {name!r} cannot be written; it must be one of {', '.join(_FORMATS)}")
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = table[name] = getattr(importlib.import_module(module), attribute)
    return found


def formats_for(engine: str, result: Any) -> tuple[list[str], list[str]]:
    """The formats that hold a `Compressed`, as far as shapes and kinds tell, and in which an engine opens it: our own
    alone where it is dense. Then why the others do not."""
    if engine in DENSE and not result.stored:
        return [OWN], []
    found, reasons = [], []
    for format in map(find, _FORMATS):
        if engine not in format.engines:
            continue
        try:
            format.check_shapes(result.model)
            format.check_tokenizer(result.tokenizer, result.model.config)
        except LayerError as error:
            reasons.append(str(error))
            continue
        if (reason := format.refusal_of_model(engine, result.model)) is None:
            found.append(format.name)
        else:
            reasons.append(f"{engine} does not open it in format {format.name}: {reason}")
    return found, reasons


def format_for(engine: str, result: Any) -> str:
    """The first of `formats_for` that holds the values of a `Compressed` as well.

    Raises:
        LayerError: there is none; the message says why of each.
    """
    found, reasons = formats_for(engine, result)
    for name in found:
        try:
            if name != OWN:
                find(name).check(result.model)
            return name
        except LayerError as error:
            reasons.append(str(error))
    raise no_format(engine, reasons)


def no_format(engine: str, reasons: Iterable[str]) -> LayerError:
    return LayerError(f"no format holds this model for {engine}: {'; '.join(reasons)}")


def of_folder(folder: Path) -> Format | None:
    """The format that a folder is written in, None if it is none of these; those added last are asked first.

    Raises:
        CheckpointError: it is described in a way that none of them reads.
    """
    return next((each for each in map(find, reversed([*_READ_ONLY, *_FORMATS])) if each.reads(folder)), None)
