"""Round to nearest on floating-point numbers, weights and activations: FP8, NVFP4 and MXFP4.

    method   element        weights                               activations
    fp8      E4M3           one scale per output row              one per token, or one per layer (static)
    nvfp4    E2M1           groups of 16, scales in E4M3          likewise, under a divisor of calibration text
    mxfp4    E2M1           groups of 32, scales powers of two    likewise, at run time

Sources: FP8, arXiv 2209.05433; OCP Microscaling Formats 1.0; NVFP4 as in compressed-tensors 0.20. `rtn_fp` rounds weights
alone.
Departures: weights and activations are rounded to nearest; `rtn_fp`'s grids have no search for scales.
Limits: products are computed in floating point on the rounded numbers (`simulated`), so that no speed follows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compression import calibration, layers, numeric
from compression.errors import LayerError
from compression.methods.base import LayerMethod, check_samples, method

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context
    from compression.numeric.floats import FloatGrid


class FloatMethod(LayerMethod):
    """Weights and activations on one grid of floating-point numbers; `static` is whether text is read for ranges."""

    setting: ClassVar[dict[str, Any]]  # of the grid
    static: ClassVar[bool] = False

    def grid(self) -> "FloatGrid":
        return numeric.floats.FloatGrid(**self.setting)

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.grouping.check_group(in_features, self.setting["group_size"])

    @property
    def measured(self) -> Any:
        return calibration.observers.Largest if self.static else None

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        return self._layer(linear, 1.0 if self.static else None)

    def fit_linear(self, linear: "nn.Linear", inputs: Any, context: "Context") -> "Linear":
        if self.static and inputs is None:
            raise LayerError("no text was read for its static range; set activations=static for the whole recipe, and "
                             "token for the layers that are to have it")  # fmt: skip
        return self._layer(linear, inputs)

    def _layer(self, linear: "nn.Linear", largest: Any) -> "Linear":
        grid, ranged = self.grid(), layers.activations.FloatRange
        if not self.static:
            entering = ranged(grid)
        else:
            entering = ranged(grid, largest) if isinstance(largest, float) else ranged.fitted(grid, largest)
        return layers.codes.packed_linear(linear.weight, linear.bias, grid, input_part=entering)


@method("fp8", paper="arXiv:2209.05433")
@dataclass(frozen=True, kw_only=True)
class FP8(FloatMethod):
    """FP8 (E4M3) weights and activations, rounded to nearest (W8A8)."""

    setting: ClassVar[dict[str, Any]] = {"element": "e4m3", "group_size": -1, "scale": "float"}

    activations: Literal["token", "static"] = "token"  # one scale per token, or one per layer found on calibration text
    samples: int = 128  # of calibration text, for static scales
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)

    @property
    def static(self) -> bool:  # type: ignore[override]
        return self.activations == "static"

    @property
    def calibration(self) -> tuple[int, int] | None:
        return (self.samples, self.sequence_length) if self.static else None


@method("nvfp4", needs=("calibration",))
@dataclass(frozen=True, kw_only=True)
class NVFP4(FloatMethod):
    """FP4 weights and activations in groups of 16 with scales in E4M3, rounded to nearest (NVFP4, W4A4)."""

    setting: ClassVar[dict[str, Any]] = {"element": "e2m1", "group_size": 16, "scale": "e4m3"}
    static: ClassVar[bool] = True

    samples: int = 128  # of calibration text, for the divisor of the activations' scales
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)

    @property
    def calibration(self) -> tuple[int, int]:
        return self.samples, self.sequence_length


@method("mxfp4")
@dataclass(frozen=True, kw_only=True)
class MXFP4(FloatMethod):
    """FP4 weights and activations in groups of 32 with scales that are powers of two, rounded to nearest (MXFP4)."""

    setting: ClassVar[dict[str, Any]] = {"element": "e2m1", "group_size": 32, "scale": "e8m0"}
