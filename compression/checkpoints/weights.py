"""The tensors of a checkpoint, read from safetensors or drawn on demand, and put into a model."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compression.architectures import embeddings, published
from compression.architectures.anatomy import Architecture
from compression.architectures.skeleton import known_config
from compression.architectures.table import architecture_of, named
from compression.checkpoints.base import BaseSource, build
from compression.errors import CheckpointError, LayerError
from compression.numeric.checks import FLOATS

# older exports store these tables, which follow from the configuration
_STALE = re.compile(r".*\.rotary_emb\.inv_freq|.*\.attention\.(bias|masked_bias)")


@dataclass(frozen=True)
class Weights:
    """The tensors of a base, each read or made when it is asked for.

    Attributes:
        where: what to call them in messages.
        headers: every tensor by name, on the meta device.
        dtype: in which weights are given: that of the embeddings.
    """

    where: str
    headers: Mapping[str, Tensor]
    dtype: torch.dtype
    _make: Callable[[list[str]], dict[str, Tensor]]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of these names, in memory of their own.

        Raises:
            CheckpointError: a file is damaged, or a value is not finite.
        """
        return self._make(list(names))


def open_weights(source: BaseSource, device: str = "cpu", seed: int = 0) -> Weights:
    """The weights of an uncompressed base; of files, only what they say of their content is read yet.

    Random weights are drawn for each tensor by itself, from the seed and the tensor's name.

    Raises:
        CheckpointError: a file is damaged or truncated, or two files hold one name.
    """
    row = named(source.config["architectures"][0], str(source.folder))
    if source.kind == "random":
        dtype = getattr(torch, source.config["dtype"])
        model = build(source.config, dtype, device="meta")
        headers = model.state_dict()
        if model.config.tie_word_embeddings:
            del headers[row.head_weight]
        std = model.config.initializer_range

        def make(names: list[str]) -> dict[str, Tensor]:
            return {name: _random(name, headers[name], (1 - row.norm_offset, std), device, seed) for name in names}

        return Weights(source.text, headers, dtype, make)
    config = known_config(source.config)
    return of_files(source.files, lambda name, tensor: published.apart(name, tensor, row, config), row,
                    where=str(source.folder), one_dtype=True, device=device)  # fmt: skip


def of_files(
    files: Iterable[Path],
    apart: Callable[[str, Tensor], Mapping[str, Tensor]],
    row: Architecture,
    *,
    where: str,
    one_dtype: bool = False,
    device: str = "cpu",
) -> Weights:
    """The tensors of safetensors files under the names of the model; only what the files say of them is read yet.

    Args:
        apart: the tensors of the model that one of the files holds, by name; of one on the meta device likewise.
        row: of the architecture.
        where: what to call them in messages.
        one_dtype: whether floating-point numbers are given in the dtype of the embeddings, whatever they are stored in.

    Raises:
        CheckpointError: a file is damaged or truncated, or two files hold one name.
    """
    places, theirs = index(files)
    headers: dict[str, Tensor] = {}
    held_in: dict[str, str] = {}
    for name, header in not_stale(theirs).items():
        own = apart(name, header)
        headers |= own
        held_in |= dict.fromkeys(own, name)
    embedding = headers.get(row.embeddings_weight)
    dtype = torch.float32 if embedding is None else embedding.dtype  # without it, `fit` refuses

    def cast(name: str, tensor: Tensor) -> Tensor:
        return in_dtype(row, name, tensor, dtype) if one_dtype else tensor

    def read(names: list[str]) -> dict[str, Tensor]:
        wanted, tensors = set(names), {}
        stored = read_named(places, dict.fromkeys(held_in[name] for name in names))
        while stored:  # a fused tensor goes as soon as it is taken apart
            own = apart(*stored.popitem())
            tensors |= {key: cast(key, tensor) for key, tensor in own.items() if key in wanted}
        check_finite(tensors, where)
        return {name: tensors[name].to(device) for name in names}

    return Weights(where, {name: cast(name, header) for name, header in headers.items()}, dtype, read)


def in_dtype(row: Architecture, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point numbers in the dtype of the model, but for those that its architecture keeps in fp32."""
    kept = tensor.dtype not in FLOATS or row.kept_in_float32(name)
    return tensor if kept else tensor.to(dtype)


def _random(name: str, header: Tensor, scales: tuple[float, float], device: str, seed: int) -> Tensor:
    """Matrices from N(0, std^2), norms at what makes them one, biases at zero: the published initialisation.

    They are drawn on the CPU, the same numbers for every device: the digest of such a base is that of its seed.
    """
    tensor, (one, std) = torch.empty_like(header, device="cpu"), scales
    if name.endswith("bias"):
        return tensor.zero_().to(device)
    if tensor.ndim == 1:
        return tensor.fill_(one).to(device)
    own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
    return tensor.normal_(0, std, generator=torch.Generator().manual_seed(own)).to(device)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Give the model exactly these tensors.

    Raises:
        CheckpointError: the names or shapes differ from the model's, or a value is not finite; names are listed.
    """
    tensors = not_stale(tensors)
    fit(model, tensors, where=where)
    check_finite(tensors, where)
    assign(model, tensors, where=where)


def not_stale(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the tables that older exports store and that follow from the configuration."""
    return {name: tensor for name, tensor in tensors.items() if not _STALE.fullmatch(name)}


def fit(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Raise CheckpointError unless the names, shapes and kinds of number are those of the model; values may be meta."""
    expected = model.state_dict()
    optional = {architecture_of(model).head_weight} if embeddings.tied(model) else set()
    missing, extra = sorted(expected.keys() - tensors.keys() - optional), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{where} does not fit {type(model).__name__}: "
            + "; ".join(f"{what} {_few(names)}" for what, names in (("missing", missing), ("unknown", extra)) if names)
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, the configuration asks for "
                f"{tuple(expected[name].shape)}"
            )
        if tensor.dtype != expected[name].dtype and not {tensor.dtype, expected[name].dtype} <= FLOATS:
            raise CheckpointError(f"{where}: {name} is stored as {tensor.dtype}, expected {expected[name].dtype}")


def assign(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Put tensors that fit into the model: all of its tensors, or those outside its blocks, or headers in their place.

    Raises:
        CheckpointError: there are two heads where the configuration ties the head to the embeddings, or a stored layer
            is not what it is described as (`compression.numeric.checks`).
    """
    row = architecture_of(model)
    if embeddings.tied(model) and isinstance(model.get_submodule(row.head), nn.Linear):
        first, second = row.embeddings_weight, row.head_weight
        embedding = tensors[first]
        head = tensors.get(second, embedding)
        if not (head.is_meta or torch.equal(head, embedding)):
            raise CheckpointError(f"{where}: {second} differs from {first}, and config.json ties them; set "
                                  "tie_word_embeddings to false there if both are meant")  # fmt: skip
        tensors = {**tensors, second: embedding}
    try:
        model.load_state_dict(tensors, assign=True, strict=False)
    except LayerError as error:
        raise CheckpointError(f"{where}: {error}; it was written wrongly, or damaged later") from error


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError if a value is NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{where}: {name} has NaN or infinite values")


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files, in memory of their own: mapped, it would not be counted where it is used.

    Raises:
        CheckpointError: a file is damaged or truncated, or two files hold one name.
    """
    places, _ = index(files)
    return read_named(places, places)


def index(files: Iterable[Path]) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """Where each tensor is, and its shape and dtype as a tensor on the meta device."""
    places: dict[str, Path] = {}
    headers: dict[str, Tensor] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in places:
                    raise CheckpointError(f"{path}: tensor {name} is also in another file")
                places[name], headers[name] = path, file.get_tensor(name).to("meta")
    return places, headers


def bytes_in(files: Iterable[Path]) -> int:
    """Bytes of all tensors in safetensors files; CheckpointError as `index`."""
    return sum(header.nbytes for header in index(files)[1].values())


def first_difference(first: Iterable[Path], second: Iterable[Path]) -> str | None:
    """The name of a tensor that two sets of files do not hold alike, None if there is none.

    Raises:
        CheckpointError: a file is damaged or truncated, or two files of a set hold one name.
    """
    (places, headers), (others, other_headers) = index(first), index(second)
    for name in sorted(headers.keys() | other_headers.keys()):
        one, other = headers.get(name), other_headers.get(name)
        if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            return name
        bits = [read_named(where, [name])[name].reshape(-1).view(torch.uint8) for where in (places, others)]
        if not torch.equal(*bits):
            return name
    return None


def read_named(places: Mapping[str, Path], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of these names, in memory of their own, from the files that `index` found them in."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(places[name], []).append(name)
    tensors = {}
    for path, held in by_file.items():
        with _opened(path) as file:
            tensors |= {name: file.get_tensor(name).clone() for name in held}
    return tensors


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not safetensors: {error}; download it again") from error


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
