"""Round to nearest, weights and activations, on E2M1 in groups of 32 with scales that are powers of two: MXFP4.

Source: OCP Microscaling Formats 1.0. Scales of activations are found at run time. `rtn_fp` rounds weights alone.
Departures: scales follow from the largest values; nothing is searched for.
Limits: products are computed in floating point on the rounded numbers (`simulated`), so that no speed follows.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from compression.methods.base import method
from compression.methods.quantization.weight_activation.base import FloatMethod


@method("mxfp4")
@dataclass(frozen=True, kw_only=True)
class MXFP4(FloatMethod):
    """FP4 weights and activations in groups of 32 with scales that are powers of two, rounded to nearest (MXFP4)."""

    setting: ClassVar[dict[str, Any]] = {"element": "e2m1", "group_size": 32, "scale": "e8m0"}
