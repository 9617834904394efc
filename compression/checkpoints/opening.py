"""Folders opened: what `Compressed.save` and the engine wrote, published checkpoints, and dense ones.

`open_unread` looks at headers and descriptions alone; what it returns is then read whole (`load`), or piece by piece.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.architectures import decoder, description, embeddings, published, skeleton, stored
from compression.architectures.table import NORMS, architecture_of
from compression.caches import replaying
from compression.caches.policy import Policy
from compression.checkpoints import base as _checkpoint
from compression.checkpoints import identity, weights
from compression.checkpoints.artefact import SCHEMA, STATE, Compressed
from compression.checkpoints.base import MANIFEST, BaseSource
from compression.checkpoints.formats import registry as formats
from compression.checkpoints.formats.registry import Format
from compression.checkpoints.pieces import Unread
from compression.checkpoints.weight_files import INDEX, WEIGHTS
from compression.cost import Cost
from compression.errors import CheckpointError, LayerError
from compression.files.strict_json import check_signature, expanded, finite
from compression.layers import legacy
from compression.layers.embedding import Embedding
from compression.layers.kernels import choose
from compression.layers.report import LayerReport
from compression.recipes.recipe import UNCOMPRESSED, Recipe


@dataclass(frozen=True)
class Opened:
    """A checkpoint of which no tensor is read yet.

    Attributes:
        result: its model is without weights.
        unread: that model, and what reads it.
        source: where it is; of a folder of ours what is beside the weights is all that it knows.
        format: that it is stored in; None for a folder of ours, and for a dense checkpoint.
    """

    result: Compressed
    unread: Unread
    source: BaseSource
    format: Format | None = None

    @property
    def digest(self) -> str:
        """Of all that the checkpoint says: every byte of its weights is read for it."""
        folder = self.result.folder
        if folder is None or not (folder / MANIFEST).exists():
            return self.source.digest
        manifest = read_manifest(folder)
        return identity.of_files(folder, [folder / MANIFEST, *_files(folder, manifest)])


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
    opened = _described(path, device, backend)
    if opened is None:
        raise CheckpointError(f"{path} has no {MANIFEST}; open a dense checkpoint as a base instead")
    generation_config = opened.source.generation_config
    _checkpoint.finish(opened.unread.whole(), device, generation_config)
    return opened.result


def outline(path: Path) -> Compressed:
    """What a folder of ours holds, its model on the meta device: no tensor is read.

    Raises:
        CheckpointError: as `load`.
    """
    return _own(path).result


def open_unread(text: str) -> Opened:
    """What `load` opens, or a dense checkpoint by the text of a base, without reading a tensor.

    Raises:
        CheckpointError: as `load`, and as `open_base`.
    """
    if (opened := _described(Path(text), "cpu", None)) is not None:
        return opened
    source = _checkpoint.locate(text).fetch()
    _checkpoint.refuse_compressed(source)
    read = weights.open_weights(source)
    unread = Unread.of(_checkpoint.build(source.config, read.dtype, device="meta"), read)
    skeleton.tie(unread.model)
    result = Compressed(
        model=unread.model, recipe=Recipe.parse(UNCOMPRESSED), base=(source.label, source.digest),
        tokenizer_source=lambda: source.tokenizer, folder=source.folder,
    )  # fmt: skip
    return Opened(result, unread, source)


def _described(path: Path, device: str, backend: str | None) -> Opened | None:
    """What says of itself what its layers are stored in; None for all else."""
    if (path / MANIFEST).exists():
        opened = _own(path)
        _take_backend(opened.result.model, backend, device)
        return opened
    if (path / STATE).exists():
        raise CheckpointError(f"{path} is not finished; repeat the command that writes it to resume")
    format = formats.of_folder(path)
    return None if format is None else _published(format.source(path), format, device, backend)


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


def _files(path: Path, manifest: dict[str, Any]) -> list[Path]:
    names = manifest.get("files")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise CheckpointError(f"{path / MANIFEST} is damaged or incomplete: files must be names in its folder")
    for name in names:
        expanded(path / name, lambda why: CheckpointError(f"{path / MANIFEST} names an invalid file: {why}"))
    if missing := [name for name in names if not (path / name).exists()]:
        raise CheckpointError(f"{path / MANIFEST} names missing files: {', '.join(missing)}")
    return [path / name for name in names]


def _own(path: Path) -> Opened:
    """A folder of ours."""
    import torch

    manifest, source = read_manifest(path), BaseSource(str(path), "folder", path)
    config = source.config
    model = _checkpoint.build(config, torch.float32, device="meta")  # each tensor comes in the dtype it is stored in
    try:
        description.restore(model, manifest.get("edits", []))
        stored.put_all(model, manifest["layers"])
        if "cache" in manifest:
            replaying.attach(model, Policy.from_json(manifest["cache"]))
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
    row, names = architecture_of(model), manifest.get("renamed", {})
    read = weights.of_files(_files(path, manifest), lambda name, tensor: published.apart(
        names.get(name, name), tensor, row, model.config), row, where=str(path))  # fmt: skip
    unread = Unread.of(model, read)
    skeleton.tie(model)
    result = Compressed(
        model=model, recipe=recipe, base=base, executed=executed, report=report, seconds=seconds, notes=notes,
        cost=cost, tokenizer_source=lambda: _checkpoint.read_tokenizer(path, config), folder=path,
    )  # fmt: skip
    return Opened(result, unread, source)


def _published(source: BaseSource, format: Format, device: str, backend: str | None) -> Opened:
    """A published checkpoint."""
    unread, recipe = format.read(source)
    model = unread.model
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
    result = Compressed(
        model=model, recipe=recipe, base=(source.label, source.digest), executed=(recipe.text,), report=tuple(report),
        folder=source.folder, tokenizer_source=lambda: source.tokenizer, bytes_in_files=format.stored_bytes(source),
    )  # fmt: skip
    return Opened(result, unread, source, format)


def _stored_as(layer: Any, device: str) -> str:
    parts = layer.table.parts() if isinstance(layer, Embedding) else layer.parts()
    return f"{', '.join(each.words for each in parts)}, kernel {layer.kernel_name(device)}"
