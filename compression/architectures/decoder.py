"""A decoder as its row of the table describes it: blocks, halves, sites, the residual stream."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures import embeddings
from compression.architectures.anatomy import Architecture, Half, SiteRow, sites
from compression.architectures.table import ARCHITECTURES, architecture_of
from compression.architectures.turned import RESIDUAL, ResidualMap
from compression.errors import LayerError
from compression.layers.embedding import Embedding
from compression.layers.linear import Linear
from compression.numeric import whole_numbers

HALVES = 2  # of a block: attention, then the MLP


@dataclass(frozen=True)
class Block:
    """One decoder block: `name` is its path in the model, e.g. model.layers.3; `row` is that of its architecture.

    It is the one of `number`, from 0, of `count` blocks.
    """

    name: str
    module: nn.Module
    row: Architecture
    number: int = 0
    count: int = 1

    @cached_property
    def halves(self) -> tuple[Half, Half]:
        """Attention and MLP, as this block has them."""

        def count(path: str) -> int:
            return len(self.module.get_submodule(path))  # type: ignore[arg-type]

        return self.row.halves(self.has, count)

    @property
    def attention(self) -> Half:
        return self.halves[0]

    @property
    def mlp(self) -> Half:
        return self.halves[1]

    def has(self, path: str) -> bool:
        """Whether there is a module at a path in the block."""
        try:
            return self.module.get_submodule(path) is not None
        except AttributeError:
            return False

    def linears(self) -> Iterator[tuple[str, nn.Linear | Linear]]:
        """Full name and layer of every linear that methods may take, in the order of the module; routers are none."""
        routers = {path for site in sites(self.halves) for path in site.routers}
        for path, module in _whole(self.module, nn.Linear | Linear):
            if path not in routers:
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
        return [Site(self, number, row) for number, row in enumerate(sites(self.halves))]

    @property
    def head_size(self) -> int:
        """Of values."""
        return getattr(self.layer(self.attention.module), self.attention.head_size)

    @property
    def heads(self) -> tuple[int, int]:
        """Number of query heads, and of heads of keys and values."""
        writer, values = self.layer(self.attention.writer), self.layer(self.attention.producer)
        return writer.in_features // self.head_size, values.out_features // self.head_size

    @property
    def neurons(self) -> int:
        """Of the MLP, or of each expert that is routed to."""
        return self.layer(self.mlp.inner[0].producer or "").out_features

    def residual(self, half: int) -> ResidualMap | None:
        """What the stream is multiplied by beside a half; None where it passes as it is."""
        return getattr(self.module, RESIDUAL.format(self.halves[half].name), None)


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
        """A norm, or a linear layer; None where the readers read the residual stream itself."""
        return None if self.row.producer is None else self.block.layer(self.row.producer)

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

    def ends(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Of the ranges of each input of the readers (cols,), the widest for each channel."""
        channels = self.channels.to(low.device)
        return whole_numbers.widest(low, high, channels, int(channels.max()) + 1)

    @property
    def shiftable(self) -> bool:
        """Whether biases can take a shift of its channels in (`edits.Shift`)."""
        if self.row.of == "norm":
            return getattr(self.producer, "bias", None) is not None
        return self.row.of == "values" and self.row.unshifted is None


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
        return [Block(self.row.block(i), module, self.row, i, len(modules)) for i, module in enumerate(modules)]

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
        return [Place(self, i) for i in range(len(blocks) * HALVES + 1)]

    def logits(self, hidden: Tensor, head: Any = None) -> Tensor:
        """What the model makes of its last hidden states (..., width): the head, and what its architecture adds.

        `head` stands for its own, if one is given.
        """
        config, logits = self.model.config, (head or self.head)(hidden)
        if self.row.logits_divisor is not None:
            logits = logits / getattr(config, self.row.logits_divisor)
        cap = getattr(config, self.row.logits_cap) if self.row.logits_cap is not None else None
        return logits if cap is None else torch.tanh(logits / cap) * cap


@dataclass(frozen=True)
class Place:
    """Where the residual stream is read, and can be turned: place 2 b + h is in front of half h of block b."""

    decoder: Decoder
    number: int

    @property
    def block(self) -> Block | None:
        """None in front of the head."""
        blocks, at = self.decoder.blocks, self.number // HALVES
        return blocks[at] if at < len(blocks) else None

    @property
    def half(self) -> Half:
        """Raises LayerError: it is in front of the head."""
        if self.block is None:
            raise LayerError(f"{self.name} is in front of no block")
        return self.block.halves[self.number % HALVES]

    @property
    def name(self) -> str:
        """The full name of the norm, or of what reads the stream without one."""
        if self.block is None:
            return self.decoder.row.norm
        return self.block.full(self.half.norm or self.half.module)

    @property
    def norm(self) -> Any:
        """None where the stream is read without one."""
        bare = self.block is not None and self.half.norm is None
        return None if bare else self.decoder.model.get_submodule(self.name)

    @property
    def readers(self) -> list[str]:
        """Full names of what reads the norm, routers among it."""
        if self.block is None:
            return [self.decoder.row.head]
        row = next(s for s in sites(self.block.halves) if set(self.half.site.readers) <= set(s.readers))
        return [self.block.full(path) for path in (*row.readers, *row.routers)]


def logits_of(model: Any) -> Any:
    """What makes logits of last hidden states; of a model that no row describes, as one that judges, its head."""
    return Decoder(model).logits if type(model).__name__ in ARCHITECTURES else model.get_output_embeddings()


def check_trainable(model: nn.Module) -> None:
    """Raise LayerError if losses cannot be computed on a model: they take the product with its head for its logits."""
    row, config = architecture_of(model), model.config
    if row.logits_cap is not None and getattr(config, row.logits_cap) is not None:
        raise LayerError(f"{row.head}: {row.name} caps its logits ({row.logits_cap}), which no loss here takes into "
                         "account; it can be compressed, and not trained")  # fmt: skip


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
