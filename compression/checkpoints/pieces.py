"""A model that is read piece by piece: what is outside its blocks is the first piece, each block another."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from compression.architectures import decoder
from compression.architectures.table import architecture_of
from compression.checkpoints.weights import Weights, assign, fit
from compression.cost import trim
from compression.errors import CheckpointError, LayerError


@dataclass(frozen=True)
class Unread:
    """A model without weights, and what reads them.

    Attributes:
        model: its tensors are on the meta device, in the shapes and types that they are read in.
        weights: of it, by the names of its state dict.
    """

    model: Any
    weights: Weights

    @classmethod
    def of(cls, model: Any, weights: Weights) -> "Unread":
        """Of a model on the meta device.

        Raises:
            CheckpointError: the names, shapes or kinds of number are not those of the model.
        """
        fit(model, weights.headers, where=weights.where)
        assign(model, weights.headers, where=weights.where)
        return cls(model, weights)

    @cached_property
    def names(self) -> list[list[str]]:
        """Those of the tensors of each piece."""
        row = architecture_of(self.model)
        found: list[list[str]] = [[] for _ in range(len(self.blocks) + 1)]
        for name in self.weights.headers:
            number = name.removeprefix(f"{row.blocks}.").partition(".")[0] if row.inside(name) else -1
            found[int(number) + 1].append(name)
        return found

    @cached_property
    def blocks(self) -> list[decoder.Block]:
        return decoder.decoder_blocks(self.model)

    @contextmanager
    def filled(self, number: int) -> Iterator[dict[str, Tensor]]:
        """The tensors of a piece by name, which are in the model as long as this lasts.

        Raises:
            CheckpointError: a file is damaged, or tensors are not what the model is described as.
        """
        trim()
        tensors = self.weights.read(self.names[number])
        self._put(number, tensors)
        try:
            yield tensors
        finally:
            self._put(number, {name: tensor.to("meta") for name, tensor in tensors.items()})

    def filling(self) -> Iterator[dict[str, Tensor]]:
        """Each piece in turn, filled until the next is asked for."""
        for number in range(len(self.names)):
            with self.filled(number) as tensors:
                yield tensors

    def whole(self) -> Any:
        """The model with all of its tensors. Raises CheckpointError as `filled`."""
        for number, names in enumerate(self.names):
            self._put(number, self.weights.read(names))
        return self.model

    def _put(self, number: int, tensors: dict[str, Tensor]) -> None:
        where = self.weights.where
        if number == 0:
            assign(self.model, tensors, where=where)
            return
        block = self.blocks[number - 1]
        own = {name.removeprefix(f"{block.name}."): tensor for name, tensor in tensors.items()}
        try:
            block.module.load_state_dict(own, assign=True, strict=False)
        except LayerError as error:
            raise CheckpointError(f"{where}: {block.name}.{error}; it was written wrongly, or damaged later") from error
