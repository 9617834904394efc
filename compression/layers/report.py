"""What became of each layer of a model."""

from dataclasses import dataclass
from typing import Any

from compression.files.strict_json import exact_fields

LEFT_ALONE = "the recipe leaves this layer alone"  # in reports


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer: `outcome` is "replaced" or "kept", and `detail` says by what or why."""

    name: str
    outcome: str
    detail: str

    @classmethod
    def from_json(cls, entry: Any) -> "LayerReport":
        """The inverse of `dataclasses.asdict`; raises ValueError."""
        fields = exact_fields(entry, {"name", "outcome", "detail"})
        if not all(isinstance(value, str) for value in fields.values()):
            raise ValueError(f"a report {entry!r:.200} must be of texts")
        return cls(**fields)
