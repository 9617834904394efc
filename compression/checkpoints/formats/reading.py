"""Whole checkpoints of the published formats, read into a model with packed layers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compression.architectures import decoder, embeddings
from compression.architectures import published as layouts
from compression.architectures.fused import Fused
from compression.architectures.table import named
from compression.checkpoints import base, weights
from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats.description import read_config
from compression.checkpoints.formats.layer import INPUT, PACKED, LayerStore, layer_of, split
from compression.checkpoints.formats.stores import stores_of
from compression.checkpoints.pieces import Unread
from compression.checkpoints.weights import Weights
from compression.errors import CheckpointError, LayerError
from compression.layers.codes import Codes
from compression.layers.linear import Linear


def describes(folder: Path, quant_method: str) -> bool:
    """Whether a folder says that it was quantized so. Raises CheckpointError where it contradicts itself."""
    path = folder / "config.json"
    published = read_config(folder, base._read_json(path)) if path.exists() else None
    return published is not None and published.quant_method == quant_method


def open_model(source: BaseSource) -> Unread:
    """The model of a published checkpoint on the CPU, its quantized layers packed; scales keep their dtype.

    Layers that are stored uncompressed stay dense, and all dense tensors take the dtype of the embeddings.

    Raises:
        CheckpointError: see `checkpoints.base.open_base`; and a layer whose tensors are incomplete or contradict the
            shapes, the group size or the symmetry that the configuration names. What values tell, reading tells.
    """
    return _Checkpoint(source).unread()


def dense_weights(source: BaseSource, device: str = "cpu") -> Weights:
    """The tensors of the dense model that a published checkpoint stands for, each layer decoded when it is asked for.

    Raises:
        CheckpointError: as `open_model`; `read`: a file is damaged, or a value is not finite.
    """
    unread = open_model(source)
    packed, layers = unread.weights, decoder.stored_layers(unread.model)
    tensors: dict[str, list[str]] = {name: [] for name in layers}
    headers: dict[str, Tensor] = {}
    for name, header in packed.headers.items():
        if (owner := layer_of(name)) is None:
            headers[name] = header
        else:
            tensors[owner].append(name)
            headers[f"{owner}.weight"] = torch.empty(layers[owner].weight_part.shape, dtype=packed.dtype, device="meta")
    owners = {f"{name}.weight": name for name in layers}

    def read(names: list[str]) -> dict[str, Tensor]:
        found = packed.read(each for name in names for each in (tensors[owners[name]] if name in owners else [name]))
        for name in names:
            if (owner := owners.get(name)) is not None:
                layer = copy.deepcopy(layers[owner])
                own = {each.removeprefix(f"{owner}."): found.pop(each) for each in tensors[owner]}
                layer.load_state_dict(own, assign=True, strict=False)
                found[name] = layer.to_linear().weight.detach()
        return {name: found[name].to(device) for name in names}

    return Weights(packed.where, headers, packed.dtype, read)


class _Checkpoint:
    """A published checkpoint, of which headers and a few small tensors are read."""

    def __init__(self, source: BaseSource):
        assert source.published is not None
        self.published, self.where = source.published, str(source.folder)
        self.row = named(source.config["architectures"][0], self.where)
        self.places, headers = weights.index(source.files)
        self.headers = {layouts.our_name(name, self.row): each for name, each in weights.not_stale(headers).items()}
        self.theirs = {layouts.our_name(name, self.row): name for name in headers}
        embedding = self.headers.get(self.row.embeddings_weight)
        self.dtype = torch.float32 if embedding is None else embedding.dtype  # without it, nothing fits
        self.model = base.build(source.config, self.dtype, device="meta")
        self.held: dict[str, tuple[_Stored, LayerStore]] = {}  # by the name of a part in the model
        self.held_in: dict[str, str] = {}  # dense tensors of the model

    def unread(self) -> Unread:
        """Every layer in its place, without tensors."""
        linears = _linears(self.model)
        try:
            stores = stores_of(self.published, {each.name: layouts.their_name(each.name, self.row) for each in linears})
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from error
        rest = dict(self.headers)
        for each in linears:
            store = stores.get(each.name)
            if store is not None and (stored := _take(rest, each.name, each.whole, store, self.where)):
                self._put(each, store, stored)
        if not self.held:
            raise CheckpointError(f"{self.where}: {self.published.quant_method} is what the configuration names, but "
                                  "no layer of the model is stored so")  # fmt: skip
        if self.row.head in self.held and embeddings.tied(self.model):
            raise CheckpointError(f"{self.where}: {self.row.head} is quantized, and config.json ties it to the "
                                  "embeddings")  # fmt: skip
        dense: dict[str, Tensor] = {}
        for name, header in rest.items():
            own = self._apart(name, header)
            dense |= own
            self.held_in |= dict.fromkeys(own, name)
        packed = {name: each for name, each in self.model.state_dict().items() if layer_of(name)}
        return Unread.of(self.model, Weights(self.where, dense | packed, self.dtype, self._read))

    def _put(self, each: "_Stored", store: LayerStore, stored: dict[str, Tensor]) -> None:
        """The parts of a layer, without tensors."""
        told = {key: self.theirs[f"{each.name}.{key}"] for key in store.telling if key in stored}
        values = weights.read_named(self.places, told.values())
        known = stored | {key: values[name] for key, name in told.items()}
        with self._said(each):
            grid, permuted = store.outline(known, each.whole.out_features, each.whole.in_features)
            for name, linear in each.parts:
                part = Codes(grid, linear.out_features, linear.in_features, dtype=self.dtype, permuted=permuted)
                bias = None if linear.bias is None else linear.bias.detach()
                self.model.set_submodule(name, Linear(part, bias, input_part=store.input_part()))
                self.held[name] = (each, store)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors of the model, those of a layer all at once."""
        owners = {name: layer_of(name) for name in names}
        layers = {each.name: (each, store) for each, store in
                  (self.held[owner] for owner in owners.values() if owner is not None)}  # fmt: skip
        wanted = dict.fromkeys(self.held_in[name] for name, owner in owners.items() if owner is None)
        for each, store in layers.values():
            keys = (*store.tensors(each.whole.out_features, each.whole.in_features), "bias")
            wanted |= dict.fromkeys(f"{each.name}.{key}" for key in keys if f"{each.name}.{key}" in self.headers)
        stored = weights.read_named(self.places, (self.theirs[name] for name in wanted))
        tensors = {name: stored[self.theirs[name]] for name in wanted}
        found: dict[str, Tensor] = {}
        for each, store in layers.values():
            own = _take(tensors, each.name, each.whole, store, self.where)
            with self._said(each):
                entering = store.read_input(own)
            for (name, _), part in zip(each.parts, self._parts(own, each, store), strict=True):
                found |= {f"{name}{PACKED}{key}": value for key, value in part.state_dict().items()}
                found |= {f"{name}{INPUT}{key}": value for key, value in entering.items()}
        for name in list(tensors):
            found |= self._apart(name, tensors.pop(name))
        if unknown := sorted(found.keys() - set(names)):
            raise CheckpointError(f"{self.where} does not fit {type(self.model).__name__}: unknown {unknown[0]}")
        weights.check_finite(found, self.where)
        return found

    def _parts(self, tensors: dict[str, Tensor], each: "_Stored", store: LayerStore) -> list[Codes]:
        """The weight of each part.

        Raises:
            CheckpointError: groups are not of one size, scales not finite, or zero points not what the description
                says.
        """
        with self._said(each):
            whole = store.read(tensors, each.whole.out_features, each.whole.in_features, self.dtype)
            return split(whole, each.sizes, by_head=each.by_head) if each.sizes else [whole]

    def _apart(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A dense tensor as those of the model."""
        own = layouts.apart(name, tensor, self.row, self.model.config)
        return {key: weights.in_dtype(self.row, key, value, self.dtype) for key, value in own.items()}

    @contextmanager
    def _said(self, each: "_Stored") -> Iterator[None]:
        try:
            yield
        except (ValueError, LayerError) as error:
            raise CheckpointError(f"{self.where}: {each.name}: {error}") from error


@dataclass(frozen=True)
class _Stored:
    """A layer as the formats know it: a linear layer, or the fused one of several, `parts` by name."""

    name: str
    whole: nn.Linear
    parts: tuple[tuple[str, nn.Linear], ...]
    sizes: tuple[int, ...] = ()
    by_head: bool = False


def _linears(model: nn.Module) -> list[_Stored]:
    """All that a model has, those that are opened apart together."""
    found, inside = [], set()
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            parts = tuple((f"{name}.{each}", module.get_submodule(each)) for each in module.names)
            inside |= {each for each, _ in parts}
            first, outputs = parts[0][1], sum(part.out_features for _, part in parts)  # type: ignore[misc]
            whole = nn.Linear(first.in_features, outputs, bias=first.bias is not None, device="meta")  # type: ignore[arg-type]
            found.append(_Stored(name, whole, parts, module.sizes, module.by_head))  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear) and name not in inside:
            found.append(_Stored(name, module, ((name, module),)))
    return found


def _take(tensors: dict[str, Tensor], name: str, linear: nn.Linear, store: LayerStore, where: str) -> dict[str, Tensor]:
    """Removes the tensors of a quantized layer from `tensors` and returns them, checked; empty for a dense layer."""
    rows, cols = linear.out_features, linear.in_features
    wanted = store.tensors(rows, cols)
    if store.mark is not None and f"{name}.{store.mark}" not in tensors:
        return {}
    stored = {key: tensors.pop(f"{name}.{key}") for key in wanted if f"{name}.{key}" in tensors}
    if not stored and not store.required:
        return {}
    if f"{name}.weight" in tensors:
        if not stored:
            raise CheckpointError(f"{where}: {name} is stored as a dense weight, and its configuration says "
                                  f"{store.words}")  # fmt: skip
        raise CheckpointError(f"{where}: {name} is stored twice: as weight and as {', '.join(stored)}")
    if missing := [f"{name}.{key}" for key, each in wanted.items() if key not in stored and not each.optional]:
        raise CheckpointError(f"{where}: missing {', '.join(missing)}; the layer cannot be read without it; "
                              "download the checkpoint again")  # fmt: skip
    if reason := store.refusal(rows, cols):
        raise CheckpointError(f"{where}: {name} does not fit its format: {reason}")
    for key, tensor in stored.items():
        known = wanted[key].shapes
        if known is not None and tuple(tensor.shape) not in known:
            shapes = " or ".join(map(str, known))
            raise CheckpointError(f"{where}: {name}.{key} has shape {tuple(tensor.shape)}; {store.words} make it "
                                  f"{shapes}")  # fmt: skip
        if tensor.dtype not in wanted[key].dtypes:
            raise CheckpointError(f"{where}: {name}.{key} is stored as {tensor.dtype}, expected "
                                  f"{' or '.join(map(str, wanted[key].dtypes))}")  # fmt: skip
    bias = f"{name}.bias"
    given = tensors.get(bias)  # AutoGPTQ wrote one of zeros everywhere
    if linear.bias is None and given is not None and (given.is_meta or not given.any()):
        del tensors[bias]
    return stored
