"""Formats that are opened and not written: what they hold is converted to another one."""

from pathlib import Path
from typing import Any

from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats import grouped, reading
from compression.checkpoints.formats.registry import Format, Written
from compression.errors import LayerError


class ReadOnlyFormat(Format):
    """A format without `write`.

    Attributes:
        name: how it is called, which is also its `quant_method`.
        instead: the formats that hold what it holds, in words.
    """

    instead: str

    def __init__(self, name: str, instead: str):
        self.name, self.instead = name, instead

    def accepts(self, layer: Any) -> str | None:
        return f"it is read, not written; take {self.instead}"

    def check_shapes(self, model: Any) -> None:
        raise LayerError(f"format {self.name} is read, not written; take {self.instead}")

    def write(self, model: Any, recipe: Any) -> Written:
        self.check_shapes(model)
        raise AssertionError

    def reads(self, folder: Path) -> bool:
        return reading.describes(folder, self.name)

    def read(self, source: BaseSource) -> tuple[Any, Any]:
        return grouped.read(source)


HQQ = ReadOnlyFormat("hqq", "own, which holds real zero points")
TORCHAO = ReadOnlyFormat("torchao", "compressed-tensors, or own")
