"""Compressed models: the result of compressing, how it is written and reopened.

A folder written by `Compressed.save` holds config.json, the weights, what goes with them (`_beside`) and
compression.json, which names the files of the weights and says how each packed or sparse layer is stored.

- A result without such layers is a plain transformers checkpoint besides, in model.safetensors.
- One with such layers is nothing to any other program, and none may take it for something: engines read the config.json
  of a model that they know, skip a quantization that they do not, and draw the weights that they miss. So its model
  type is one that nobody knows, and its weights are neither in model.safetensors nor in an index.
- With a `format` the folder is one of the published formats instead (`formats.description`), without compression.json.
- A folder written block by block (`engine.stream`, `engine.conversion`) has several safetensors files, with an index
  unless only this package opens it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from compression.architectures import decoder, description, published
from compression.architectures.table import architecture_of
from compression.caches import replaying
from compression.checkpoints.base import MANIFEST
from compression.checkpoints.formats import registry as formats
from compression.checkpoints.formats.registry import OWN, Written
from compression.checkpoints.output import check_writable, tensor_filler
from compression.checkpoints.size import count_parameters, stored_bytes
from compression.checkpoints.weight_files import WEIGHTS
from compression.cost import Cost
from compression.errors import CheckpointError, LayerError
from compression.files.atomic import filling
from compression.files.strict_json import signed
from compression.layers import positions
from compression.layers.report import LayerReport
from compression.layers.stored import describe
from compression.recipes.recipe import Recipe

# 1: has no digest, does not name the files of the weights; a packed model has the names of a transformers checkpoint
# 2: describes layers by class, and calls their tensors otherwise (`layers.legacy`)
SCHEMA = 3
STATE = "compression.state.json"  # in a folder that is not finished
_PACKED = "compressed.safetensors"


@dataclass
class Compressed:
    """A model after a recipe.

    Attributes:
        model: transformers' decoder with its layers replaced; in eval mode.
        base: text and digest of the base that it came from.
        executed: the steps as they were run, inserted `dequantize` and re-applied quantizers included.
        report: one entry for every layer that could have been replaced, and for the tables that stay.
        notes: sentences that a reader of the result has to know, such as of too little calibration text.
        seconds: that each of the steps in `executed` took; empty where they took each block together.
        folder: the checkpoint whose tokenizer and generation settings go with the model; None for random bases.
        bytes_in_files: of the tensors in the files of a published checkpoint; None for others.
    """

    model: Any
    recipe: Recipe
    base: tuple[str, str]
    executed: tuple[str, ...] = ()
    report: tuple[LayerReport, ...] = ()
    seconds: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    cost: Cost | None = None
    tokenizer_source: Callable[[], Any] = field(default=lambda: None, repr=False)
    folder: Path | None = None
    bytes_in_files: int | None = None

    def __post_init__(self) -> None:
        positions.watch(self.model)

    @property
    def tokenizer(self) -> Any:
        return self.tokenizer_source()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored, shared ones counted once.

        Of a published checkpoint those in its files, which may hold groups and zero points that follow from others.
        """
        return stored_bytes(self.model) if self.bytes_in_files is None else self.bytes_in_files

    @property
    def cache_factory(self) -> Callable[[], Any] | None:
        """Makes the empty cache with which the model decodes; None where any cache of transformers will do."""
        return None if replaying.policy_of(self.model) is None else partial(replaying.new_cache, self.model)

    @property
    def parameters(self) -> int:
        """Number of weights that the model has, whatever they are stored in."""
        return count_parameters(self.model)

    @property
    def portable(self) -> tuple[str, ...]:
        """The engines that open what `save` writes, in one of the formats that `published_formats` names."""
        found = [formats.find(name) for name in self.published_formats]
        opening = (e for each in found for e in each.engines if each.refusal_of_model(e, self.model) is None)
        return tuple(dict.fromkeys([*(() if self.stored else formats.DENSE), *opening]))

    @property
    def stored(self) -> bool:
        """Whether there is anything in the model that no plain checkpoint holds."""
        changed = decoder.stored_layers(self.model) or description.describe(self.model)
        return bool(changed) or replaying.policy_of(self.model) is not None

    @property
    def published_formats(self) -> tuple[str, ...]:
        """Values of `format` in which `save` can write the model without changing a weight."""

        def fits(name: str) -> bool:
            with contextlib.suppress(LayerError):
                formats.find(name).check_result(self)
                return True
            return False

        return tuple(filter(fits, formats.names()[1:]))

    def own_format(self, files: list[str]) -> Written:
        """How the model is written in the format of this package, its weights in these files."""
        layers = {name: describe(layer) for name, layer in decoder.stored_layers(self.model).items()}
        blocks = decoder.decoder_blocks(self.model)
        inside = tuple(f"{block.name}." for block in blocks if decoder.stored_layers(block.module))

        def tensors(state: Mapping[str, Any]) -> dict[str, Any]:
            own = {name: tensor for name, tensor in state.items() if name.startswith(inside)}
            dense = {name: tensor for name, tensor in state.items() if name not in own}
            return published.together(dense, architecture_of(self.model), self.model.config) | own

        return Written(tensors, {MANIFEST: self.manifest(layers, files)})

    def _filler(self) -> Callable[[Path], None]:
        """What writes the model in the format of this package."""
        packed = _PACKED if self.stored else None
        written = self.own_format([packed or WEIGHTS])
        return tensor_filler(self, written.tensors(self.model.state_dict()), written.described, packed=packed)

    def manifest(self, layers: dict[str, dict[str, Any]], files: list[str]) -> dict[str, Any]:
        """What compression.json says, with a description of each stored layer by name, and the files of the weights."""
        import torch

        return signed({
            "schema": SCHEMA,
            "files": files,
            "recipe": self.recipe.to_json(),
            "text": self.recipe.text,
            "base": {"text": self.base[0], "digest": self.base[1]},
            "executed": list(self.executed),
            "seconds": list(self.seconds),
            "torch": torch.__version__,
            "cost": None if self.cost is None else dataclasses.asdict(self.cost),
            "report": [dataclasses.asdict(entry) for entry in self.report],
            "notes": list(self.notes),
            "layers": layers,
            **({"edits": changed} if (changed := description.describe(self.model)) else {}),
            **({"cache": policy.to_json()} if (policy := replaying.policy_of(self.model)) else {}),
        })  # fmt: skip

    def kernels(self, device: str | None = None) -> dict[str, int]:
        """How many packed or sparse layers get which kernel on the device, by default where the model is."""
        counts: dict[str, int] = {}
        for layer in decoder.stored_layers(self.model).values():
            name = layer.kernel_name(device)
            counts[name] = counts.get(name, 0) + 1
        return counts

    def save(self, folder: str | Path, format: str = OWN) -> Path:
        """Write the model; the folder is whole or none that anything opens.

        Args:
            folder: a new or an empty one; a link to one, or a mount point.
            format: "own", or a published format (`formats.registry`), which engines open (`portable`).

        Raises:
            CheckpointError: the folder is there already and not empty, or cannot be written.
            LayerError: a layer does not fit the format exactly; nothing is written.
        """
        from safetensors import SafetensorError

        target = check_writable(Path(folder))
        own = format == OWN
        fill = self._filler() if own else formats.find(format).filler(self)
        try:
            with filling(target, MANIFEST if own else formats.find(format).last) as work:
                fill(work)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be written: {error}") from error
        return Path(folder)
