"""Rotary positions that look at the longest position of a forward pass, and so at what shares it.

LongRoPE (arXiv 2402.13753) turns by other frequencies where a pass is longer than the length of the first training, and
dynamic NTK scaling by frequencies that grow with the longest pass so far. Up to that length both are as any other; a
longer text has to be read by itself to get what it gets alone.
"""

from typing import Any

from compression import architectures


def limit(config: Any) -> int | None:
    """The positions of a pass up to which none of them changes another; None where none ever does."""
    given = getattr(config, "rope_parameters", None) or {}
    by_layer = [each for each in given.values() if isinstance(each, dict)] or [given]
    found = []
    for rope in by_layer:
        if rope.get("rope_type") == "longrope":
            found.append(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        elif "dynamic" in rope.get("rope_type", ""):
            found.append(config.max_position_embeddings)
    return min(found, default=None)


def forget(model: Any) -> None:
    """Back to the frequencies of a model that has read nothing; dynamic scaling keeps those of its longest pass."""
    if limit(model.config) is not None:
        architectures.skeleton.renew_tables(model)
