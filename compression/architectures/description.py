"""The shapes of a changed decoder, as JSON: the edits that make a fresh model of its configuration take its tensors."""

import dataclasses
import json
from typing import Any

import torch
from torch import nn

from compression.architectures import rotations  # noqa: F401 - defines an edit
from compression.architectures.decoder import HALVES, Block, Decoder, Place
from compression.architectures.edits import EDITS, Edit, InBlock, Shift, Turn
from compression.errors import LayerError
from compression.files.strict_json import exact_fields, flag_field
from compression.numeric.checks import WIDEST, check_size


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """The edits that give a fresh model of this one's configuration its shapes, as JSON; none for most models."""
    decoder = Decoder(model)
    places, turned = decoder.places(), [_is_turned(place) for place in decoder.places()]
    edits: list[Edit] = []
    for place, is_turned in zip(places, turned, strict=True):
        if is_turned:
            edits.append(Turn(place.number, torch.empty(decoder.width, len(place.norm.weight), device="meta")))
    for number, block in enumerate(decoder.blocks):
        for site in block.sites:
            paths = site.row.readers if block.row.norm_kind == "layer" else (site.row.producer, *site.row.readers)
            if site.shiftable and any(_has_new_bias(block, path, model.config) for path in paths):
                values = torch.empty(len(site.producer.weight), device="meta")
                edits.append(InBlock(number, Shift(site.number, values)))
    return [edit.to_json() for edit in edits]


def restore(model: nn.Module, described: Any) -> None:
    """Apply what `describe` gave to a model of the same configuration, without weights.

    Raises:
        LayerError: it is no list of edits, or one of them does not fit the model.
    """
    if not isinstance(described, list):
        raise LayerError(f"edits of the decoder must be a list, not {json.dumps(described)[:80]}")
    decoder = Decoder(model)
    for entry in described:
        from_json(entry).apply(decoder)


def _is_turned(place: Place) -> bool:
    """Whether the stream passes a matrix on either side of a place."""
    blocks = place.decoder.blocks
    beside = [n for n in (place.number - 1, place.number) if 0 <= n < len(blocks) * HALVES]
    return all(blocks[n // HALVES].residual(n % HALVES) is not None for n in beside)


def _has_new_bias(block: Block, path: str, config: Any) -> bool:
    usual = block.row.biases.get(path, False)
    usual = bool(getattr(config, usual, False)) if isinstance(usual, str) else usual
    return block.layer(path).bias is not None and not usual


def from_json(entry: Any) -> Edit:
    """The edit that `to_json` gave this of, its tensors on the meta device.

    Raises:
        LayerError: it is none.
    """
    try:
        kind = EDITS.get(entry.get("edit")) if isinstance(entry, dict) else None
        if kind is None:
            raise ValueError(f"{entry!r:.200} must be an edit, one of {', '.join(EDITS)}")
        fields = exact_fields(entry, {"edit", *(field.name for field in dataclasses.fields(kind))})
        return kind(**{name: _value(each) for name, each in fields.items() if name != "edit"})
    except (ValueError, TypeError) as error:
        raise LayerError(f"an edit of the decoder cannot be: {error}") from None


def _value(value: Any) -> Any:
    """What `rewriting.plain` gave, its tensors on the meta device."""
    if isinstance(value, dict) and "edit" in value:
        return from_json(value)
    if isinstance(value, dict):
        shape, whole = exact_fields(value, {"shape", "whole"})["shape"], flag_field(value, "whole")
        if not isinstance(shape, list) or len(shape) > 3:
            raise ValueError(f"shape={shape!r:.80} must be a list of at most 3 numbers")
        for size in shape:
            check_size("shape", size)
        return torch.empty(shape, dtype=torch.int64 if whole else torch.float32, device="meta")
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        check_size("a number of an edit", number, 0, WIDEST)
    return tuple(value) if isinstance(value, list) else value
