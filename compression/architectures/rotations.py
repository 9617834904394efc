"""The residual stream of a decoder turned by one matrix, which leaves a decoder of the same kind and shapes.

    RotateStream    x -> x R everywhere: in the embeddings, all readers, all writers, and the head

RMS norms whose weights are folded into their readers do not see a rotation. With one matrix for all places none is left
beside the blocks, as `edits.Turn` leaves them, which has a basis for each. This is R1 of SpinQuant, arXiv 2405.16406,
and stage 1a of QuaRot, arXiv 2404.00456. R2, within each head of values, is `edits.Rotate`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures.decoder import HALVES, Block, Decoder
from compression.architectures.edits import Edit, InBlock, Rotate
from compression.architectures.rewriting import parameter, put
from compression.errors import LayerError


@dataclass(frozen=True, eq=False)
class RotateStream(Edit, kind="rotate_stream"):
    """The whole residual stream times `matrix`, orthogonal (width, width)."""

    matrix: Tensor

    def apply(self, target: Decoder) -> None:
        self.check(target)
        row, embeddings = target.row, target.embeddings
        for name, change, produces in self.changes(target):
            if name == row.embeddings:
                weight, _ = change(embeddings.weight.double(), None)
                embeddings.weight = parameter(weight.to(embeddings.weight.dtype))
            else:
                put(target.model, name, change, produces=produces)

    def check(self, target: Decoder) -> None:
        """Raise LayerError if the stream cannot be turned, in words."""
        row, width = target.row, target.width
        if (why := row.unturned) is not None:
            raise LayerError(f"{row.embeddings}: the residual stream of {row.name} cannot be turned: {why}")
        if self.matrix.shape != (width, width):
            raise LayerError(f"{row.embeddings}: the rotation of the residual stream must be {(width, width)}, not "
                             f"{tuple(self.matrix.shape)}")  # fmt: skip
        for place in target.places():
            half = place.number % HALVES
            if place.block is not None and place.block.residual(half) is not None:
                raise LayerError(f"{place.name}: the stream passes a matrix beside this block already; turn the whole "
                                 "of it before the step that cuts it")  # fmt: skip
            weight = place.norm.weight
            if not weight.is_meta and not (weight + row.norm_offset == 1).all():
                raise LayerError(f"{place.name} has a weight that a turn would mix; fold it into its readers first")
        if not isinstance(target.embeddings, nn.Embedding) or target.tied:
            raise LayerError(f"{row.embeddings} is packed, or is the head too; untie it before it is turned")

    def changes(self, target: Decoder) -> Iterator[tuple[str, Any, bool]]:
        """By full name of each layer, what becomes of its weight and bias, and whether its outputs are other ones."""

        def read(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return weight @ self.matrix.to(weight.device, weight.dtype), bias

        def write(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            turn = self.matrix.to(weight.device, weight.dtype).mT
            return turn @ weight, None if bias is None else turn @ bias

        yield target.row.embeddings, read, True
        for place in target.places():
            for name in place.readers:
                yield name, read, False
            if place.block is not None:
                for path in place.half.writers:
                    yield place.block.full(path), write, True


def merged(decoder: Decoder, stream: Tensor, heads: list[Tensor]) -> list[Edit]:
    """The edits that rotate the stream by R1 (width, width), and all heads of values of each block by its R2 (head
    size, head size): heads that share one of values, and what reads them, have the same matrix so."""
    edits: list[Edit] = [RotateStream(stream)]
    for number, (block, matrix) in enumerate(zip(decoder.blocks, heads, strict=True)):
        for site in block.sites:
            if site.row.of == "values":
                edits.append(InBlock(number, Rotate(site.number, matrix.expand(block.heads[1], -1, -1))))
    return edits


def down_projections(decoder: Decoder) -> list[tuple[Block, str]]:
    """What reads the neurons of an MLP, or of an expert, by its path in its block."""
    return [(block, path) for block in decoder.blocks for site in block.sites if site.row.of == "neurons"
            for path in site.row.readers]  # fmt: skip


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within it parameters of 16 bits are fp32, so that several edits round once, when they go back at its end.

    A layer of parts with a dense weight may come between; tensors are replaced, none is written into.
    """
    before = {name: each.dtype for name, each in model.named_parameters() if each.dtype.itemsize == 2}
    _cast(model, dict.fromkeys(before, torch.float32))
    yield
    _cast(model, before)


def _cast(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, each in list(model.named_parameters()):
        dtype = dtypes.get(name.replace(".weight_part.", "."))
        if dtype is not None and each.dtype != dtype:
            path, _, own = name.rpartition(".")
            setattr(model.get_submodule(path), own, parameter(each.to(dtype)))
