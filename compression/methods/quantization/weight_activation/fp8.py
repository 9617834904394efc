"""Weights and activations rounded on E4M3: W8A8 in FP8.

Source: arXiv 2209.05433. Weights have one scale per output row, activations one per token, found at run time, or one
per layer, found on calibration text. `rtn_fp` rounds weights alone.
`rounding=gptq` chooses weights' codes by GPTQ, arXiv 2210.17323, on the same scales.
Departures: scales follow from the largest values; nothing is searched for.
Limits: products are computed in floating point on the rounded numbers (`simulated`), so that no speed follows.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from compression.methods.base import check_samples, method
from compression.methods.quantization.weight_activation.base import FloatMethod


@method("fp8", paper="arXiv:2209.05433")
@dataclass(frozen=True, kw_only=True)
class FP8(FloatMethod):
    """FP8 (E4M3) weights and activations, rounded to nearest or, the weights, by GPTQ (W8A8)."""

    setting: ClassVar[dict[str, Any]] = {"element": "e4m3", "group_size": -1, "scale": "float"}

    activations: Literal["token", "static"] = "token"  # one scale per token, or one per layer found on calibration text
    samples: int = 128  # of calibration text, for static scales and for rounding=gptq
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)

    @property
    def static(self) -> bool:
        return self.activations == "static"
