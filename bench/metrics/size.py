"""Stored size of a compressed model, counted from its tensors and never from nominal bits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.errors import MetricError
from bench.metrics.registry import metric
from compression import architectures, checkpoints, layers

if TYPE_CHECKING:
    from torch import nn


def stored(model: Any) -> int:
    """Bytes of all that `save` writes of a model.

    Raises MetricError for a packed layer whose state dict has not as many bytes as it says that it stores: one that
    holds something besides, or gives nominal bits.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, layers.linear.Linear):
            written = sum(tensor.nbytes for tensor in layer.state_dict().values())
            if layer.stored_bytes != written:
                raise MetricError(
                    f"{name} reports {layer.stored_bytes} stored bytes, but {written} are written: a size "
                    "is what is stored, never nominal bits"
                )
    return checkpoints.size.stored_bytes(model)


@dataclass(frozen=True, kw_only=True)
class ArtefactReading:
    """Bytes as stored and number of weights of a model, and of the base that it came from; `zeros` of the weights."""

    stored_bytes: int
    parameters: int
    base_stored_bytes: int
    base_parameters: int
    zeros: int = 0


def reading(model: "nn.Module", base: "nn.Module", in_files: int | None = None) -> ArtefactReading:
    """What a model stores, and its base; of the base itself both are the same. Raises MetricError as `stored` does.

    `in_files` are the bytes of a published checkpoint, whose files hold more than the model is made of.
    """
    written = stored(model)
    return ArtefactReading(
        stored_bytes=written if in_files is None else in_files, parameters=checkpoints.size.count_parameters(model),
        zeros=zeros(model),
        base_stored_bytes=stored(base), base_parameters=checkpoints.size.count_parameters(base),
    )  # fmt: skip


@metric("efficiency.stored_bytes", unit="B", better="lower", kind="counted", of="artefact")
def stored_bytes(artefact: ArtefactReading) -> float:
    """Bytes of all parameters and buffers as stored: codes, scales, zero points, embeddings, head and norms."""
    return artefact.stored_bytes


@metric("efficiency.model_size_gb", unit="GiB", better="lower", kind="counted", of="artefact")
def model_size_gb(artefact: ArtefactReading) -> float:
    """Model size in GiB, which the papers print as GB: stored bytes / 2^30 ([E] table 1)."""
    return artefact.stored_bytes / 2**30


@metric("efficiency.parameters", unit="weights", better="neither", kind="counted", of="artefact")
def parameters(artefact: ArtefactReading) -> float:
    """Number of weights, whatever they are stored in."""
    return artefact.parameters


@metric("efficiency.bits_per_parameter", unit="bit", better="lower", kind="counted", of="artefact")
def bits_per_parameter(artefact: ArtefactReading) -> float:
    """Stored bits for each weight of the base: 8 * stored bytes / weights of the base, so that pruning counts too.

    >>> bits_per_parameter(ArtefactReading(stored_bytes=8, parameters=16, base_stored_bytes=32, base_parameters=16))
    4.0
    """
    return 8 * artefact.stored_bytes / artefact.base_parameters


@metric("efficiency.compression_ratio", unit="x", better="higher", kind="counted", of="artefact")
def compression_ratio(artefact: ArtefactReading) -> float:
    """How many times smaller than the base: stored bytes of the base / stored bytes ([E] table 2).

    >>> compression_ratio(ArtefactReading(stored_bytes=8, parameters=16, base_stored_bytes=32, base_parameters=16))
    4.0
    """
    return artefact.base_stored_bytes / artefact.stored_bytes


@metric("efficiency.memory_reduction", unit="%", better="higher", kind="counted", of="artefact")
def memory_reduction(artefact: ArtefactReading) -> float:
    """Share of the base's bytes that is saved: 100 * (1 - stored bytes / stored bytes of the base) ([E] table 2).

    >>> memory_reduction(ArtefactReading(stored_bytes=8, parameters=16, base_stored_bytes=32, base_parameters=16))
    75.0
    """
    return 100 * (1 - artefact.stored_bytes / artefact.base_stored_bytes)


@metric("efficiency.sparsity", unit="share", better="neither", kind="deterministic", of="artefact")
def sparsity(artefact: ArtefactReading) -> float:
    """Share of the base's weights that are gone, or are zero in a linear layer: 1 - (weights - zeros) / weights of the
    base ([E] table 17, "sparsity / reduction"). What a quantizer's grid rounds to zero counts as well.

    >>> sparsity(ArtefactReading(stored_bytes=8, parameters=12, base_stored_bytes=32, base_parameters=16, zeros=4))
    0.5
    """
    return 1 - (artefact.parameters - artefact.zeros) / artefact.base_parameters


def zeros(model: "nn.Module") -> int:
    """Weights of linear layers that are exactly zero, packed and sparse ones as they decode; one layer at a time."""
    from torch import nn

    stored = architectures.decoder.stored_layers(model)
    inside = tuple(f"{path}." for path in stored)
    dense = [
        layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and path not in stored and not path.startswith(inside)
    ]
    return sum(int((layer.weight == 0).sum()) for layer in dense) + sum(
        int((layer.to_linear().weight == 0).sum())
        for layer in stored.values()
        if isinstance(layer, layers.linear.Linear)
    )
