"""The decoder blocks of a model, the linear layers in them, and what reaches them.

The supported decoders (Llama, Mistral, Qwen2, Qwen3) name the parts of a block alike: STACKS holds for all of them.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compression.layers import embedding
from compression.layers.embedding import Embedding
from compression.layers.kernels.torch_products import product_dtype
from compression.layers.linear import Linear

Stack = tuple[str, ...]

# The linear layers of a block, those that read the same input together, and the module whose output channels that input
# consists of: a channel of it divided by a number reaches its readers divided by that number, whatever lies between
# (attention, the activated gate). The norms read the residual stream; linears that produce nothing here write it.
STACKS: dict[Stack, str] = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "input_layernorm",
    ("self_attn.o_proj",): "self_attn.v_proj",
    ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
    ("mlp.down_proj",): "mlp.up_proj",
}


@dataclass(frozen=True)
class Block:
    """One decoder block: `name` is its path in the model, e.g. model.layers.3."""

    name: str
    module: nn.Module

    def linears(self) -> Iterator[tuple[str, nn.Linear | Linear]]:
        """Full name and layer of every linear in the block, in the order of the module."""
        for path, module in _whole(self.module, nn.Linear | Linear):
            yield f"{self.name}.{path}", module

    def producer_channels(self, stack: Stack) -> Tensor:
        """For each input of a stack the channel of its producer, int64 (cols,).

        Inputs of o_proj whose heads share a head of keys and values share its channels; all others have their own.
        """
        cols, attention = self.module.get_submodule(stack[0]).in_features, self.module.self_attn
        if STACKS[stack] != "self_attn.v_proj":
            return torch.arange(cols)
        heads = torch.arange(attention.v_proj.out_features).view(-1, attention.head_dim)
        return heads.repeat_interleave(cols // heads.numel(), 0).flatten()

    def replace(self, name: str, layer: nn.Module) -> None:
        """Put `layer` in the place of the one of that full name."""
        self.module.set_submodule(name.removeprefix(f"{self.name}."), layer)


def decoder_blocks(model: nn.Module) -> list[Block]:
    """The blocks in the order in which the hidden state passes through them."""
    return [Block(f"model.layers.{i}", module) for i, module in enumerate(model.model.layers)]  # type: ignore[union-attr, arg-type]


class Inputs:
    """What reaches one decoder block for each calibration sample; `advance` takes it to the next block.

    Attributes:
        hidden: the hidden states of each sample, (1, length, hidden size), in the dtype of the model, or in fp32 on a
            CPU that does not multiply bf16 in hardware.
        arguments: for each block what transformers passes beside them (positions, mask), the same for all samples.
    """

    def __init__(self, hidden: list[Tensor], arguments: list[dict[str, Any]], at: int = 0):
        self.hidden, self.arguments = hidden, arguments
        self._at = at

    @classmethod
    @torch.no_grad()
    def of_first_block(cls, model: nn.Module, ids: Tensor) -> "Inputs":
        """Run token ids (samples, length) through the model with every block left out; blocks need no weights."""
        blocks = decoder_blocks(model)
        hidden: list[Tensor] = []
        arguments: list[dict[str, Any]] = [{} for _ in blocks]

        def note(i: int, states: Tensor, **others: Any) -> Tensor:
            if i == 0:
                hidden.append(states.to(product_dtype(states.dtype, states.device)))
            arguments[i] = others
            return states

        try:
            for i, block in enumerate(blocks):
                block.module.forward = partial(note, i)  # type: ignore[method-assign]
            for sample in ids.split(1):
                model.model(input_ids=sample, use_cache=False)  # type: ignore[operator, union-attr]
        finally:
            for block in blocks:
                block.module.__dict__.pop("forward", None)
        return cls(hidden, arguments)

    @classmethod
    def of_block(cls, at: int, hidden: list[Tensor], model: nn.Module, ids: Tensor) -> "Inputs":
        """What reached block `at` before, as it was put away; `model` and token ids as in `of_first_block`."""
        return cls(hidden, cls.of_first_block(model, ids[:1]).arguments, at)

    @torch.no_grad()
    def observe(self, block: Block, see: Callable[[Stack, Tensor], None]) -> None:
        """Run the samples through a block; `see` gets the input of every stack, (1, length, cols)."""

        module = self._computing(block, see)
        for states in self.hidden:
            module(states, **self.arguments[self._at])

    @torch.no_grad()
    def advance(self, block: Block, see: Callable[[Stack, Tensor], None] | None = None) -> None:
        """Put the outputs of a block in the place of its inputs; `see` as in `observe`."""
        module = self._computing(block, see)
        for i, states in enumerate(self.hidden):
            self.hidden[i] = module(states, **self.arguments[self._at])
        self._at += 1

    def _computing(self, block: Block, see: Callable[[Stack, Tensor], None] | None = None) -> nn.Module:
        """A copy of the block in the dtype of the hidden states, its stored layers unpacked once for all samples."""

        def hook(stack: Stack, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            see(stack, arguments[0])  # type: ignore[misc]

        module = copy.deepcopy(block.module)
        make_dense(module, activations=True)
        for stack in STACKS if see else ():
            module.get_submodule(stack[0]).register_forward_pre_hook(partial(hook, stack))
        return module.to(self.hidden[0].dtype)


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
    """Put a dense layer in the place of every stored one; with `activations`, what its parts do to them stays."""
    if isinstance(getattr(getattr(module, "model", None), "embed_tokens", None), Embedding):
        embedding.unpack(module)
    for name, layer in stored_layers(module).items():
        module.set_submodule(name, layer.densified() if activations else layer.to_linear())  # type: ignore[union-attr]
