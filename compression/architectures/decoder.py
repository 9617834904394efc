"""A decoder as its row of the table describes it: blocks, halves, sites, the residual stream."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures import embeddings
from compression.architectures.table import Architecture, Half, SiteRow, architecture_of
from compression.layers.embedding import Embedding
from compression.layers.linear import Linear


@dataclass(frozen=True)
class Block:
    """One decoder block: `name` is its path in the model, e.g. model.layers.3; `row` is that of its architecture."""

    name: str
    module: nn.Module
    row: Architecture

    def linears(self) -> Iterator[tuple[str, nn.Linear | Linear]]:
        """Full name and layer of every linear in the block, in the order of the module."""
        for path, module in _whole(self.module, nn.Linear | Linear):
            yield f"{self.name}.{path}", module

    def layer(self, path: str) -> Any:
        """The module at a path in the block, as the row spells it."""
        return self.module.get_submodule(path)

    def full(self, path: str) -> str:
        """The full name of a path in the block."""
        return f"{self.name}.{path}"

    def replace(self, name: str, layer: nn.Module) -> None:
        """Put `layer` in the place of the one of that full name."""
        self.module.set_submodule(name.removeprefix(f"{self.name}."), layer)

    @property
    def sites(self) -> "list[Site]":
        """Producers and their readers, in the order of computation."""
        return [Site(self, number, row) for number, row in enumerate(self.row.sites)]

    @property
    def head_size(self) -> int:
        return self.layer(self.row.attention.module).head_dim

    @property
    def heads(self) -> tuple[int, int]:
        """Number of query heads, and of heads of keys and values."""
        layers = (self.layer(self.row.queries), self.layer(self.row.keys))
        return tuple(layer.out_features // self.head_size for layer in layers)  # type: ignore[return-value]

    @property
    def neurons(self) -> int:
        """Of the MLP."""
        return self.layer(self.row.gate).out_features

    def residual(self, half: int) -> "ResidualMap | None":
        """What the stream is multiplied by beside a half; None where it passes as it is."""
        return getattr(self.module, _RESIDUAL.format(self.row.halves[half].name), None)


@dataclass(frozen=True)
class Site:
    """A producer of activations and the linear layers that read exactly these.

    Channel c of the producer divided by s reaches `readers` divided by s at the inputs where `channels` is c.
    """

    block: Block
    number: int
    row: SiteRow

    @property
    def producer(self) -> Any:
        """A norm, or a linear layer."""
        return self.block.layer(self.row.producer)

    @property
    def readers(self) -> list[Any]:
        return [self.block.layer(path) for path in self.row.readers]

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the readers."""
        return tuple(map(self.block.full, self.row.readers))

    @property
    def channels(self) -> Tensor:
        """For each input of the readers the channel of the producer, int64 (cols,).

        Query heads that share a head of values share its channels; all other inputs have their own.
        """
        cols = self.readers[0].in_features
        if self.row.of != "values":
            return torch.arange(cols)
        heads = torch.arange(self.producer.out_features).view(-1, self.block.head_size)
        return heads.repeat_interleave(cols // heads.numel(), 0).flatten()

    def largest(self, values: Tensor) -> Tensor:
        """Of what is known of each input of the readers, not below 0 (cols,), the largest for each channel."""
        channels = self.channels.to(values.device)
        return values.new_zeros(int(channels.max()) + 1).scatter_reduce(0, channels, values, "amax")


class Decoder:
    """A model of transformers by the names of its row.

    Raises:
        CheckpointError: its architecture has no row.
    """

    def __init__(self, model: Any):
        self.model, self.row = model, architecture_of(model)

    @property
    def blocks(self) -> list[Block]:
        """The blocks in the order in which the hidden state passes through them."""
        modules = self.model.get_submodule(self.row.blocks)
        return [Block(self.row.block(i), module, self.row) for i, module in enumerate(modules)]

    @property
    def embeddings(self) -> Any:
        return self.model.get_submodule(self.row.embeddings)

    @property
    def norm(self) -> Any:
        """The last norm, in front of the head."""
        return self.model.get_submodule(self.row.norm)

    @property
    def head(self) -> Any:
        return self.model.get_submodule(self.row.head)

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings."""
        return embeddings.tied(self.model)

    @property
    def width(self) -> int:
        """Channels of the residual stream as the configuration has it, before any of them was cut."""
        return self.model.config.hidden_size

    def places(self) -> "list[Place]":
        """Where the residual stream is read: in front of each half of each block, then of the head."""
        blocks = self.blocks
        return [Place(self, i) for i in range(len(blocks) * len(self.row.halves) + 1)]


@dataclass(frozen=True)
class Place:
    """Where the residual stream is read, and can be turned: place 2 b + h is in front of half h of block b."""

    decoder: Decoder
    number: int

    @property
    def block(self) -> Block | None:
        """None in front of the head."""
        blocks, at = self.decoder.blocks, self.number // len(self.decoder.row.halves)
        return blocks[at] if at < len(blocks) else None

    @property
    def half(self) -> Half:
        return self.decoder.row.halves[self.number % len(self.decoder.row.halves)]

    @property
    def name(self) -> str:
        """The full name of the norm."""
        return self.decoder.row.norm if self.block is None else self.block.full(self.half.norm)

    @property
    def norm(self) -> Any:
        return self.decoder.model.get_submodule(self.name)

    @property
    def readers(self) -> list[str]:
        """Full names of the layers that read the norm."""
        return [self.decoder.row.head] if self.block is None else [self.block.full(r) for r in self.half.readers]


class ResidualMap(nn.Module):
    """x -> x R for the residual stream beside a half of a block; R is stored as a linear layer's weight, R^T."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


_RESIDUAL = "{}_residual"


class TurnedBlock(nn.Module):
    """A block whose residual stream changes its basis beside each half: x R + writer(between(readers(norm(x)))).

    It holds the modules of the block that it stands for, under their names.
    """

    def __init__(self, block: Block):
        super().__init__()
        self.row = block.row
        for name, child in block.module.named_children():
            self.add_module(name, child)
        for half in self.row.halves:
            setattr(self, _RESIDUAL.format(half.name), None)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        for half in self.row.halves:
            module, residual = self.get_submodule(half.module), getattr(self, _RESIDUAL.format(half.name))
            x = self.get_submodule(half.norm)(hidden_states)
            x = module(hidden_states=x, **arguments)[0] if half.name == "attention" else module(x)
            hidden_states = (hidden_states if residual is None else residual(hidden_states)) + x
        return hidden_states

    def turn(self, half: int, weight: Tensor) -> None:
        """Multiply the residual stream beside a half by R, given as R^T (width after it, width before it)."""
        setattr(self, _RESIDUAL.format(self.row.halves[half].name), ResidualMap(weight))


def decoder_blocks(model: nn.Module) -> list[Block]:
    """The blocks in the order in which the hidden state passes through them."""
    return Decoder(model).blocks


def copy_sharing_tensors(module: nn.Module) -> nn.Module:
    """New modules around the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def without_weights(module: nn.Module) -> nn.Module:
    """New modules around tensors of the same shapes on the meta device."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=False) for parameter in module.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def stored_layers(model: nn.Module) -> dict[str, Linear | Embedding]:
    """Every layer of a model that is none of torch's any more, by its full name."""
    return dict(_whole(model, Linear | Embedding))


def _whole(model: nn.Module, kinds: Any) -> list[tuple[str, Any]]:
    """Path and module of these kinds, but not what is inside of one of them."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]
    inside = tuple(f"{path}." for path, module in found if isinstance(module, Linear | Embedding))
    return [(path, module) for path, module in found if not path.startswith(inside)]


def as_linear(layer: nn.Linear | Linear) -> nn.Linear:
    """The layer itself, or a dense one with the same weight."""
    return layer if isinstance(layer, nn.Linear) else layer.to_linear()


def make_dense(module: nn.Module, *, activations: bool = False) -> None:
    """Put a dense layer in the place of every stored one.

    What its parts do to keys and values stays; with `activations`, what they do to inputs too.
    """
    if any(isinstance(each, Embedding) for each in module.modules()):
        embeddings.unpack(module)
    for name, layer in stored_layers(module).items():
        dense = layer.densified() if activations else layer.to_linear()  # type: ignore[union-attr]
        module.set_submodule(name, with_output(dense, getattr(layer, "output_part", None)))


@contextmanager
def keeping_outputs(block: Block) -> Iterator[None]:
    """Within it layers are replaced, and quantizers of outputs, keys' and values', stay behind those that come."""
    parts = {name: getattr(layer, "output_part", None) for name, layer in block.linears()}
    yield
    for name, layer in list(block.linears()):
        if parts.get(name) is not None and getattr(layer, "output_part", None) is None:
            block.replace(name, with_output(layer, parts[name]))


def with_output(layer: nn.Module, part: Any) -> nn.Module:
    """A layer with this part behind it, if any."""
    if part is None:
        return layer
    made = Linear.of(layer)  # type: ignore[arg-type]
    made.output_part = part
    return made
