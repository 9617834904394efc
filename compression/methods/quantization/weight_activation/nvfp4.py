"""Weights and activations rounded on E2M1 in groups of 16 with scales in E4M3: NVFP4.

Source: compressed-tensors 0.20 (`NVFP4`): scales of activations are found at run time, under one fp32 divisor for each
layer that calibration text gives, so that a token depends on no other. `rtn_fp` rounds weights alone.
`rounding=gptq` chooses weights' codes by GPTQ, arXiv 2210.17323, on the same scales.
Departures: scales follow from the largest values; nothing is searched for.
Limits: products are computed in floating point on the rounded numbers (`simulated`), so that no speed follows.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from compression.methods.base import check_samples, method
from compression.methods.quantization.weight_activation.base import FloatMethod


@method("nvfp4", needs=("calibration",))
@dataclass(frozen=True, kw_only=True)
class NVFP4(FloatMethod):
    """FP4 weights and activations in groups of 16 with scales in E4M3 (NVFP4, W4A4)."""

    setting: ClassVar[dict[str, Any]] = {"element": "e2m1", "group_size": 16, "scale": "e4m3"}

    samples: int = 128  # of calibration text, for the divisor of the activations' scales and for rounding=gptq
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)

    @property
    def static(self) -> bool:
        return True
