"""Compressed models: the result of compressing, how it is written and reopened.

A folder written by `Compressed.save` holds config.json, the weights, what goes with them (`_beside`) and
compression.json, which names the files of the weights and says how each packed or sparse layer is stored.

- A result without such layers is a plain transformers checkpoint besides, in model.safetensors.
- One with such layers is nothing to any other program, and none may take it for something: engines read the config.json
  of a model that they know, skip a quantization that they do not, and draw the weights that they miss. So its model
  type is one that nobody knows, and its weights are neither in model.safetensors nor in an index.
- With a `format` the folder is one of the published formats instead (`formats.description`), without compression.json.
- A folder written block by block (`engine.stream`) has several safetensors files, with an index if it is dense.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression.architectures import decoder, description, embeddings, published, skeleton, stored
from compression.architectures.table import NORMS, architecture_of
from compression.checkpoints import base as _checkpoint
from compression.checkpoints import side_files, weights
from compression.checkpoints.base import MANIFEST, BaseSource
from compression.checkpoints.formats import registry as formats
from compression.checkpoints.formats.registry import OWN, Format
from compression.checkpoints.output import check_writable, tensor_filler
from compression.checkpoints.size import count_parameters, stored_bytes
from compression.checkpoints.weight_files import INDEX, WEIGHTS
from compression.cost import Cost
from compression.errors import CheckpointError, LayerError
from compression.files.atomic import filling
from compression.files.strict_json import check_signature, expanded, finite, signed
from compression.layers import legacy, positions
from compression.layers.embedding import Embedding
from compression.layers.kernels import choose
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
        return bool(decoder.stored_layers(self.model) or description.describe(self.model))

    @property
    def published_formats(self) -> tuple[str, ...]:
        """Values of `format` in which `save` can write the model without changing a weight."""

        def fits(name: str) -> bool:
            with contextlib.suppress(LayerError):
                formats.find(name).check_result(self)
                return True
            return False

        return tuple(filter(fits, formats.names()[1:]))

    def _filler(self) -> Callable[[Path], None]:
        """What writes the model in the format of this package."""
        layers = {name: describe(layer) for name, layer in decoder.stored_layers(self.model).items()}
        packed = _PACKED if layers or description.describe(self.model) else None
        blocks = decoder.decoder_blocks(self.model)
        inside = tuple(f"{block.name}." for block in blocks if decoder.stored_layers(block.module))
        state = self.model.state_dict()
        own = {name: tensor for name, tensor in state.items() if name.startswith(inside)}
        dense = {name: tensor for name, tensor in state.items() if name not in own}
        state = published.together(dense, architecture_of(self.model), self.model.config) | own
        return tensor_filler(self, state, {MANIFEST: self.manifest(layers, [packed or WEIGHTS])}, packed=packed)

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


def load(folder: str | Path, device: str = "cpu", *, backend: str | None = None) -> Compressed:
    """Open what `Compressed.save` or `compress_to` wrote, or a published GPTQ, AWQ or GGUF checkpoint as it is stored.

    Args:
        folder: what was written, or a published checkpoint; of GGUF the file, or a folder with one and no config.json.
        device: where the model is to be.
        backend: the library whose kernels multiply packed layers ("native", "torch", "gptqmodel", ...); None leaves it
            to the recipe that the folder names.

    Raises:
        CheckpointError: not such a folder, an unfinished one, another schema, or tensors that are missing, unknown, of
            another shape, damaged or not finite.
        BackendError: the backend is not there, or has no kernel for a layer.
    """
    path = Path(folder)
    if not (path / MANIFEST).exists():
        if (path / STATE).exists():
            raise CheckpointError(f"{path} is not finished; repeat the command that writes it to resume")
        if (format := formats.of_folder(path)) is not None:
            return _load_published(format.source(path), format, device, backend)
        raise CheckpointError(f"{path} has no {MANIFEST}; open a dense checkpoint as a base instead")
    opened = outline(path)
    manifest = read_manifest(path)
    tensors = _renamed(weights.read_tensors(_files(path, manifest)), manifest, opened.model)
    weights.fill(opened.model, tensors, where=str(path))
    _take_backend(opened.model, backend, device)
    _checkpoint.finish(opened.model, device, side_files.read_generation_config(path))
    return opened


def _take_backend(model: Any, backend: str | None, device: str) -> None:
    """Have the kernels of a library multiply every layer of a kind that it has kernels for.

    Raises:
        BackendError: one of these layers cannot have one.
    """
    row = architecture_of(model)
    for name, layer in decoder.stored_layers(model).items() if backend else ():
        around = isinstance(layer, Embedding) or (not row.inside(name) and embeddings.is_packed(model))
        if not around and choose.serves(backend, layer.weight_part.summands[0].kind):
            layer.backend = backend
            layer.kernel_name(device)


def read_manifest(path: Path) -> dict[str, Any]:
    """compression.json of a folder; CheckpointError if it is none, or of a schema that is not read."""
    manifest = _checkpoint._read_json(path / MANIFEST)
    schema = manifest.get("schema")
    try:
        if type(schema) is not int or not 1 <= schema <= SCHEMA:
            raise CheckpointError(f"{path / MANIFEST} has schema {schema!r:.80}; this version reads 1 to {SCHEMA}")
        if schema == 1:
            weight_map = (
                _checkpoint._read_json(path / INDEX)["weight_map"] if (path / INDEX).exists() else {"": WEIGHTS}
            )
            manifest |= {"files": sorted(set(weight_map.values()))}
        else:
            check_signature(manifest)
        if schema < SCHEMA:
            layers = {name: _translated(name, each) for name, each in manifest["layers"].items()}
            renamed = legacy.tensor_names(manifest["layers"])
            manifest |= {"schema": SCHEMA, "layers": layers, "renamed": renamed}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged or incomplete: {type(error).__name__}: {error}") from error
    return manifest


def _translated(name: str, description: Any) -> dict[str, Any]:
    try:
        return legacy.translated(description)
    except LayerError as error:
        raise LayerError(f"{name}: {error}") from None


def _renamed(tensors: dict[str, Any], manifest: dict[str, Any], model: Any) -> dict[str, Any]:
    """Tensors under the names that the model has them by: published ones, and those of an earlier schema."""
    names, row, found = manifest.get("renamed", {}), architecture_of(model), {}
    for name, tensor in tensors.items():
        found |= published.apart(names.get(name, name), tensor, row, model.config)
    return found


def _files(path: Path, manifest: dict[str, Any]) -> list[Path]:
    names = manifest.get("files")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise CheckpointError(f"{path / MANIFEST} is damaged or incomplete: files must be names in its folder")
    for name in names:
        expanded(path / name, lambda why: CheckpointError(f"{path / MANIFEST} names an invalid file: {why}"))
    if missing := [name for name in names if not (path / name).exists()]:
        raise CheckpointError(f"{path / MANIFEST} names missing files: {', '.join(missing)}")
    return [path / name for name in names]


def outline(path: Path) -> Compressed:
    """What a folder of ours holds, its model on the meta device: no tensor is read.

    Raises:
        CheckpointError: as `load`.
    """
    import torch

    manifest = read_manifest(path)
    config = BaseSource(str(path), "folder", path).config
    model = _checkpoint.build(config, torch.float32, device="meta")  # each tensor comes in the dtype it is stored in
    try:
        description.restore(model, manifest.get("edits", []))
        stored.put_all(model, manifest["layers"])
        report = tuple(LayerReport.from_json(entry) for entry in manifest["report"])
        cost = None if manifest["cost"] is None else Cost.from_json(manifest["cost"])
        recipe, base = Recipe.from_json(manifest["recipe"]), (manifest["base"]["text"], manifest["base"]["digest"])
        texts = [*manifest["executed"], *base]
        if not isinstance(manifest["executed"], list) or not all(isinstance(each, str) for each in texts):
            raise TypeError(f"executed={manifest['executed']!r} and base={manifest['base']!r} must be texts")
        executed, seconds = tuple(manifest["executed"]), tuple(map(finite, manifest.get("seconds", ())))
        notes = tuple(map(str, manifest.get("notes", ())))  # folders of earlier versions have none
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged or incomplete: {type(error).__name__}: {error}") from error
    headers = _renamed(weights.index(_files(path, manifest))[1], manifest, model)
    weights.fit(model, headers, where=str(path))
    weights.assign(model, headers, where=str(path))
    skeleton.tie(model)
    return Compressed(
        model=model, recipe=recipe, base=base, executed=executed, report=report, seconds=seconds, notes=notes,
        cost=cost, tokenizer_source=lambda: _checkpoint.read_tokenizer(path, config), folder=path,
    )  # fmt: skip


def _load_published(source: BaseSource, format: Format, device: str, backend: str | None) -> Compressed:
    model, recipe = format.read(source)
    _take_backend(model, backend, device)
    packed, row = decoder.stored_layers(model), architecture_of(model)
    linears = [name for block in decoder.decoder_blocks(model) for name, _ in block.linears()]
    outside = dict.fromkeys((row.embeddings, NORMS), "the formats leave it as it is")
    uncompressed = dict.fromkeys([*linears, row.head], "the checkpoint stores it uncompressed") | outside
    report = [
        LayerReport(name, "replaced", f"{format.name}, {_stored_as(packed[name], device)}")
        if name in packed
        else LayerReport(name, "kept", why)
        for name, why in uncompressed.items()
    ]
    return Compressed(
        model=_checkpoint.finish(model, device, source.generation_config), recipe=recipe,
        base=(source.label, source.digest), executed=(recipe.text,), report=tuple(report), folder=source.folder,
        tokenizer_source=lambda: source.tokenizer, bytes_in_files=format.stored_bytes(source),
    )  # fmt: skip


def _stored_as(layer: Any, device: str) -> str:
    words = (layer.table if isinstance(layer, Embedding) else layer).weight_part.words
    return f"{words}, kernel {layer.kernel_name(device)}"
