"""Weights and activations rounded on E2M1 in groups of 32 with scales that are powers of two: MXFP4.

Source: OCP Microscaling Formats 1.0. Scales of activations are found at run time. `rtn_fp` rounds weights alone.
`rounding=gptq` chooses weights' codes by GPTQ, arXiv 2210.17323, on the same scales.
Departures: scales follow from the largest values; nothing is searched for.
Limits: products are computed in floating point on the rounded numbers (`simulated`), so that no speed follows.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from compression.methods.base import check_samples, method
from compression.methods.quantization.weight_activation.base import FloatMethod


@method("mxfp4")
@dataclass(frozen=True, kw_only=True)
class MXFP4(FloatMethod):
    """FP4 weights and activations in groups of 32 with scales that are powers of two (MXFP4, W4A4)."""

    setting: ClassVar[dict[str, Any]] = {"element": "e2m1", "group_size": 32, "scale": "e8m0"}

    samples: int = 128  # of calibration text, for rounding=gptq
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)
