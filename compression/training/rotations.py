"""Rotations of a decoder, learned by the loss of what it becomes when it is rounded (SpinQuant, arXiv 2405.16406).

The weights stay; what is learned is R1 of the residual stream and R2 of each layer, which change what rounding does and
nothing else. Both are merged into the weights anew at each step, and their gradients are those of the merged weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compression.architectures.decoder import Decoder
from compression.architectures.edits import InBlock
from compression.architectures.rotations import RotateStream, merged
from compression.errors import TrainingError
from compression.layers.linear import Linear
from compression.layers.parts import straight_through
from compression.numeric.cayley import cayley_step
from compression.numeric.grids import SignedGrid

Rotations = tuple[Tensor, list[Tensor]]  # R1 (width, width); R2 (head size, head size) of each block


@dataclass(frozen=True)
class Learned:
    """What learning came to.

    Attributes:
        rotations: orthogonal, fp64.
        losses: of each step, nat per token.
    """

    rotations: Rotations
    losses: tuple[float, ...]


class Rotated:
    """A decoder with folded norms under rotations that need not stay: its loss, with gradients for them.

    Args:
        model: dense or with layers of parts around dense weights, which may round what they read; it stays as it is.
        bits: to which linear layers of the blocks are rounded once they are rotated; None: not at all.
    """

    def __init__(self, model: nn.Module, bits: int | None):
        self.decoder, self.bits = Decoder(model), bits
        self.rounded = [name for block in self.decoder.blocks for name, _ in block.linears()]

    def loss(self, ids: Tensor, rotations: Rotations) -> Tensor:
        """Mean cross entropy of the next token, ids int64 (batch, tokens)."""
        logits = functional_call(self.decoder.model, self._tensors(rotations), (ids,), {"use_cache": False}).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    def _tensors(self, rotations: Rotations) -> dict[str, Tensor]:
        """What stands for the parameters of the model, by their names."""
        found = {name: self._stored(name) for name in self.rounded}
        for name, change in self._changes(rotations):
            found[name] = change(*(found[name] if name in found else self._stored(name)))
        tensors = {}
        for name, (weight, bias) in found.items():
            own = "weight_part.weight" if isinstance(self.decoder.model.get_submodule(name), Linear) else "weight"
            rounds = self.bits is not None and name in self.rounded
            tensors[f"{name}.{own}"] = self._nearest(weight) if rounds else weight
            if bias is not None:
                tensors[f"{name}.bias"] = bias
        return tensors

    def _stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        layer = self.decoder.model.get_submodule(name)
        weight = layer.weight_part.value() if isinstance(layer, Linear) else layer.weight
        return weight, getattr(layer, "bias", None)

    def _changes(self, rotations: Rotations) -> "list[tuple[str, Callable[..., tuple[Tensor, Tensor | None]]]]":
        changes = []
        for edit in merged(self.decoder, *rotations):
            if isinstance(edit, RotateStream):
                changes += [(name, change) for name, change, _ in edit.changes(self.decoder)]
            elif isinstance(edit, InBlock):
                block = self.decoder.blocks[edit.block]
                changes += [(block.full(path), change) for path, change, _ in edit.what.changes(block)]  # type: ignore[attr-defined]
        return changes

    def _nearest(self, weight: Tensor) -> Tensor:
        grid = SignedGrid(bits=self.bits or 8)
        scales, most = grid.fit(weight)["scales"][:, None], grid.middle - 1
        return straight_through(weight, (weight.detach() / scales).round_().clamp_(-most, most).mul_(scales))


def learn(
    model: nn.Module,
    ids: Tensor,
    start: Rotations,
    *,
    bits: int | None,
    steps: int,
    learning_rate: float,
    progress: Callable[[int], None] = lambda step: None,
) -> Learned:
    """Rotations by Cayley SGD, the learning rate falling to 0 by a cosine; each step reads one sample, in order.

    Args:
        model, bits: of `Rotated`.
        ids: int64 (samples, tokens).
        start: orthogonal, fp64.

    Raises:
        TrainingError: a loss is not finite.
    """
    rotated, (stream, heads), losses = Rotated(model, bits), start, []
    for step in range(steps):
        now = [each.float().requires_grad_() for each in (stream, *heads)]
        with torch.enable_grad():
            loss = rotated.loss(ids[step % len(ids)][None], (now[0], now[1:]))
            gradients = torch.autograd.grad(loss, now)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]) or not all(gradient.isfinite().all() for gradient in gradients):
            raise TrainingError(f"step {step + 1}: the loss of the rotated model is {losses[-1]}, or its gradient is "
                                "not finite; give a lower learning_rate")  # fmt: skip
        rate = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        stream, *heads = [cayley_step(each, gradient, rate)
                          for each, gradient in zip((stream, *heads), gradients, strict=True)]  # fmt: skip
        progress(step + 1)
    return Learned((stream, heads), tuple(losses))
