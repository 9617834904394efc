"""GGUF as a format: files opened as they are stored, and results written as one file.

A file of floating-point numbers alone is a dense model. In one with quantized tensors every matrix is a part `ggml` of
its type, but for those in F32; embeddings too where the head is one, so that what is written again is the same bytes.
Everything else is dense, in fp32, and products are taken in fp32.
"""

import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures import decoder, embeddings, skeleton
from compression.architectures.table import architecture_of
from compression.checkpoints import weights
from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats import gguf, gguf_header, gguf_tokenizer, gguf_writing
from compression.checkpoints.formats.description import GGUFTypes
from compression.checkpoints.formats.registry import Format
from compression.checkpoints.pieces import Unread
from compression.checkpoints.weights import Weights
from compression.errors import CheckpointError, LayerError
from compression.files.atomic import digest_of_file
from compression.files.strict_json import strict_json
from compression.layers.blocks import Blocks
from compression.layers.embedding import Embedding
from compression.layers.linear import Linear
from compression.numeric import ggml
from compression.recipes.recipe import Recipe
from compression.recipes.registry import resolve

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class GGUFSource(BaseSource):
    """A file in the place of a folder.

    Attributes:
        path: of the file.
    """

    path: Path = Path()

    @property
    def label(self) -> str:
        return self.path.name

    @cached_property
    def file(self) -> gguf.GGUFile:
        return gguf.open_file(self.path)

    @property
    def place(self) -> Path:
        return self.path

    @cached_property
    def published(self) -> GGUFTypes | None:
        """None for a file of floating-point numbers alone."""
        if set(self.file.types.values()) <= set(FLOATS):
            return None
        return GGUFTypes(recipe=_recipe(self.file).to_json())

    def weights(self, device: str = "cpu", seed: int = 0) -> Weights:
        """Dense, quantized ones decoded to fp32."""
        return dense_weights(self.file, device)

    @cached_property
    def config(self) -> dict[str, Any]:
        return dict(self.file.config)

    @cached_property
    def digest(self) -> str:
        return digest_of_file(self.path)

    @cached_property
    def tokenizer(self) -> Any:
        return self.file.tokenizer()

    @cached_property
    def generation_config(self) -> Any:
        from transformers import GenerationConfig

        ends = {name: token for name, token in self.config.items() if name.endswith("_token_id")}
        return GenerationConfig(**ends)


class GGUFFormat(Format):
    """One file for llama.cpp and what is built on it."""

    name = "gguf"
    engines = ("llama.cpp",)
    last = gguf_writing.NAME
    one_file = True

    def accepts(self, layer: Any) -> str | None:
        return gguf_writing.obstacle(layer)

    def check_shapes(self, model: Any) -> None:
        gguf_writing.check_model(model)
        super().check_shapes(model)

    def check(self, model: Any) -> None:
        self.check_shapes(model)
        gguf_writing.check_scales(model)

    def check_tokenizer(self, tokenizer: Any, config: Any) -> None:
        gguf_tokenizer.described(tokenizer, config.vocab_size)

    def filler(self, result: Any) -> Callable[[Path], None]:
        self.check(result.model)
        return gguf_writing.filler(result, lambda: iter([None]))

    def piecewise_filler(self, result: Any, filling: Callable[[], Iterator[Any]]) -> Callable[[Path], None]:
        self.check_shapes(result.model)
        return gguf_writing.filler(result, filling)

    def reads(self, folder: Path) -> bool:
        return gguf_header.file_in(folder) is not None

    def source(self, folder: Path) -> GGUFSource:
        path = gguf_header.file_in(folder)
        assert path is not None
        return GGUFSource(str(folder), "folder", path=path)

    def read(self, source: GGUFSource) -> tuple[Unread, Recipe]:
        return open_model(source.file), _recipe(source.file)

    def stored_bytes(self, source: GGUFSource) -> int | None:
        return None


GGUF = GGUFFormat()


def open_model(file: gguf.GGUFile) -> Unread:
    """The model of a file on the CPU.

    Raises:
        CheckpointError: a tensor is of a type that is not read, is missing, has another shape, or is not finite.
    """
    where, shapes = str(file.path), file.shapes
    _check_types(file)
    quantized = not set(file.types.values()) <= set(FLOATS)
    model = skeleton.build(file.config, torch.float32, device="meta")
    held = _put_parts(model, file.types) if quantized else {}
    dtype = torch.float32 if quantized else _narrowest(file)
    expected, headers = model.state_dict(), {}
    for name, shape in shapes.items():
        if (own := held.get(name)) is not None:
            _check_shape(where, name, shape, model, own)
        headers[own or name] = expected[own] if own else torch.empty(shape, dtype=dtype, device="meta")
    theirs = {own: name for name, own in held.items()}

    def read(names: list[str]) -> dict[str, Tensor]:
        tensors = {}
        for name, raw in file.stored({theirs.get(name, name) for name in names}):
            stored = torch.from_numpy(raw.copy())
            own = held.get(name)
            tensors[own or name] = stored if own else _floats(stored, file.types[name]).view(shapes[name]).to(dtype)
        weights.check_finite(tensors, where)
        return tensors

    return Unread.of(model, Weights(where, headers, dtype, read))


def dense_weights(file: gguf.GGUFile, device: str) -> Weights:
    """The tensors of a file as those of a dense model, in the dtype that `open_model` gives them.

    Raises:
        CheckpointError: a tensor is of a type that is not read; `read`: a value is not finite.
    """
    _check_types(file)
    dtype = _narrowest(file) if set(file.types.values()) <= set(FLOATS) else torch.float32

    def read(names: list[str]) -> dict[str, Tensor]:
        found = {}
        for name, raw in file.stored(set(names)):
            values = _floats(torch.from_numpy(raw.copy()), file.types[name])
            found[name] = values.view(file.shapes[name]).to(device=device, dtype=dtype)
        weights.check_finite(found, str(file.path))
        return found

    headers = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in file.shapes.items()}
    return Weights(str(file.path), headers, dtype, read)


def _check_types(file: gguf.GGUFile) -> None:
    if unread := [f"{name} is stored as {kind}" for name, kind in file.types.items()
                  if kind not in (*FLOATS[:1], *ggml.TYPES)]:  # fmt: skip
        raise CheckpointError(f"{file.path}: {unread[0]}, which is not read; read are F32, {', '.join(ggml.TYPES)}")


def _put_parts(model: nn.Module, types: Mapping[str, str]) -> dict[str, str]:
    """Put layers of raw blocks, without tensors, where the file has no F32; the name of their tensor in the model by
    that in the file."""
    row, held = architecture_of(model), {}

    def part_of(name: str, rows: int, cols: int, bias: bool) -> Linear | None:
        kind = types.get(f"{name}.weight", "F32")
        if kind == "F32":
            return None
        try:
            part = Blocks(kind, rows, cols, dtype=torch.float32)
        except LayerError as error:
            raise CheckpointError(f"{name}: {error}") from error
        return Linear(part, torch.empty(rows, device="meta") if bias else None)

    for block in decoder.decoder_blocks(model):
        for name, linear in list(block.linears()):
            if layer := part_of(name, linear.out_features, linear.in_features, linear.bias is not None):
                block.replace(name, layer)
                held[f"{name}.weight"] = f"{name}.weight_part.raw"
    size = tuple(model.get_submodule(row.embeddings).weight.shape)
    tied = embeddings.tied(model)
    table, head = part_of(row.embeddings, *size, False), None if tied else part_of(row.head, *size, False)
    head = table if tied else head
    if head is not None:
        model.set_submodule(row.head, head)
        held[row.embeddings_weight if tied else row.head_weight] = f"{row.head}.weight_part.raw"
        if table is not None:
            model.set_submodule(row.embeddings, Embedding(table, tied=tied))
        if table is not None and not tied:
            held[row.embeddings_weight] = f"{row.embeddings}.table.weight_part.raw"
    return held


def _check_shape(where: str, name: str, shape: tuple[int, ...], model: nn.Module, own: str) -> None:
    wanted = model.get_submodule(own.rpartition(".")[0]).shape
    if shape != wanted:
        raise CheckpointError(f"{where}: {name} has shape {shape}, the configuration asks for {wanted}")


def _floats(stored: Tensor, kind: str) -> Tensor:
    """fp32 of raw bytes."""
    return stored.view(torch.float32) if kind == "F32" else ggml.decode(stored[None], kind)[0]


def _narrowest(file: gguf.GGUFile) -> torch.dtype:
    """The dtype of all matrices, if it holds every other tensor as well; else fp32."""
    kinds = {file.types[name] for name, shape in file.shapes.items() if len(shape) > 1}
    dtype = {("BF16",): torch.bfloat16, ("F16",): torch.float16}.get(tuple(kinds), torch.float32)
    others = {name for name, shape in file.shapes.items() if len(shape) == 1}
    values = (_floats(torch.from_numpy(raw.copy()), file.types[name]) for name, raw in file.stored(others))
    return dtype if all(torch.equal(each.to(dtype).float(), each) for each in values) else torch.float32


def _recipe(file: gguf.GGUFile) -> Recipe:
    """That which the file was written with by this package; of others `gguf` with the types of its layers, if it has
    them all, and else none."""
    if isinstance(own := file.value(gguf_writing.RECIPE), str):
        try:
            return Recipe.from_json(strict_json(own))
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {gguf_writing.RECIPE} is no recipe: {error}") from error
    model = skeleton.build(file.config, torch.float32, device="meta")
    linears = [name for block in decoder.decoder_blocks(model) for name, _ in block.linears()]
    kinds = {name: file.types.get(f"{name}.weight", "F32") for name in linears}
    types = {name: None if kind == "F32" else kind.lower() for name, kind in kinds.items()}
    known = typing.get_args(typing.get_type_hints(resolve("gguf"))["type"])
    stored = [each for each in types.values() if each is not None]
    if not stored or not set(stored) <= set(known):
        return Recipe()
    most = Counter(stored).most_common(1)[0][0]
    others = {name: None if each is None else {"type": each} for name, each in types.items() if each != most}
    step = {"method": "gguf", "type": most} | ({"layers": others} if others else {})
    return Recipe.from_json({"schema": 2, "steps": [step]})
