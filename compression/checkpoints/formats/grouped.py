"""Checkpoints that say how groups of their layers are stored: opened whole, with the recipe that names every layer."""

from compression.architectures import decoder
from compression.architectures import published as layouts
from compression.architectures.fused import Fused
from compression.architectures.table import architecture_of
from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats import reading
from compression.checkpoints.formats.compressed_tensors_config import CompressedTensors
from compression.checkpoints.formats.recipes import recipe_of
from compression.checkpoints.pieces import Unread
from compression.layers.linear import Linear
from compression.recipes.recipe import Recipe


def read(source: BaseSource) -> tuple[Unread, Recipe]:
    """The model, as `reading.open_model`, and its recipe.

    Raises:
        CheckpointError: see `reading.open_model`.
    """
    published = source.published
    assert isinstance(published, CompressedTensors)
    unread = reading.open_model(source)
    model, row = unread.model, architecture_of(unread.model)
    names = [name for block in decoder.decoder_blocks(model) for name, _ in block.linears()]
    names += [row.head] if isinstance(model.get_submodule(row.head), Linear) else []
    fused = {f"{name}.{each}": name for name, module in model.named_modules() if isinstance(module, Fused)
             for each in module.names}  # fmt: skip
    schemes = {name: published.scheme_of(layouts.their_name(fused.get(name, name), row)) for name in names}
    return unread, recipe_of(published, schemes)
