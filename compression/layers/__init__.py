"""What stands in a model for a linear layer: one `Linear` with places for parts, each of a kind.

`parts` is the protocol and the registry of kinds, `linear` the layer. Weights: `dense`, `codes`, `sparse`, `low_rank`,
`columns`, `outlier_victim`. Inputs: `transforms`, `activations`. Outputs: `activations.Levels`.
"""

from typing import Any

from compression.lazy import submodules

__all__ = ["Linear", "Part", "describe", "part", "part_kinds", "restore"]

_HOMES = {
    "Linear": "linear",
    "Part": "parts",
    "part": "parts",
    "part_kinds": "parts",
    "describe": "stored",
    "restore": "stored",
}
_find = submodules(__name__)


def __getattr__(name: str) -> Any:
    return getattr(_find(_HOMES[name]), name) if name in _HOMES else _find(name)
