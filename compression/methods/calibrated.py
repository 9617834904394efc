"""Layer methods that read the inputs of each linear; those that read the same input share what is measured of it."""

from typing import TYPE_CHECKING, Any

from compression import architectures, calibration, layers, numeric
from compression.errors import RecipeError
from compression.methods.base import Context, LayerMethod, Quantizer, check_samples

if TYPE_CHECKING:
    from compression.architectures.decoder import Block
    from compression.calibration.capture import Seen


class CalibratedMethod(LayerMethod):
    """A layer method that reads the inputs of each linear.

    Linears that read the same input share what is measured of it. Subclasses are dataclasses with the fields below.
    """

    samples: int  # of calibration text
    sequence_length: int  # tokens of each
    damp: float = 0.0  # share of the mean of the Hessian's diagonal that is added to it, where there is a Hessian

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp <= 1:
            raise RecipeError(f"{self.info.name}(damp={self.damp}): allowed are 0 to 1; the paper takes 0.01")
        check_samples(self)

    @property
    def calibration(self) -> tuple[int, int]:
        """(samples, tokens of each): one run over the text serves all layers."""
        return self.samples, self.sequence_length

    @property
    def fits_hessian(self) -> bool:
        """Whether weights are fitted to the inputs by their whole Hessian, which needs many more tokens than inputs."""
        return False

    def observer(self, cols: int, device: Any) -> Any:
        """What sums up inputs (..., cols) by `add`, and has the sum as its `value()`; their Hessian."""
        return calibration.observers.Hessian(cols, device)

    def output_error(self, weight: Any, changed: Any, seen: Any) -> float:
        """The relative squared error of the outputs on what the observer has seen; weights fp32 (rows, cols)."""
        return numeric.rounding.relative_error(weight, changed, seen)

    def transform(self) -> Any:
        """The `numeric.channel_scales.AwqScales` of the inputs beforehand, or None to leave them as they are."""
        return None

    def compress_stack(self, block: Any, layers: Any, seen: Any, note: str) -> None:
        """Replace `calibration.blockwise.Layer`s of a block, which read the same input and have these settings."""
        raise NotImplementedError

    def apply_block(self, block: "Block", seen: "Seen | None", context: Context) -> None:
        assert seen is not None
        with architectures.decoder.keeping_outputs(block):
            calibration.blockwise.compress(block, seen.states, context)


class CalibratedQuantizer(Quantizer, CalibratedMethod):
    """Rounding to an affine grid by the inputs' Hessian.

    Linears that read the same input and have the same settings are rounded as one matrix. Subclasses define a `grid`, a
    rounding (`round`) and, if there is one, the `transform` before it.
    """

    group_size: int  # inputs that share a scale; -1: one scale per output channel
    backend: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size != -1 and self.group_size < 8:
            raise RecipeError(f"{self.info.name}(group_size={self.group_size}): allowed are -1 (per channel) and 8 or "
                              "more")  # fmt: skip

    def grid(self) -> Any:
        """The `compression.numeric.grids.AffineGrid` of the stored weights."""
        raise NotImplementedError

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.grouping.check_group(in_features, self.grid().group_size)

    def compress_linear(self, linear: Any, context: Context) -> Any:
        """What a linear of which no input is known becomes: rounded to nearest. Tells the kernel that it will get."""
        return layers.codes.packed_linear(linear.weight, linear.bias, self.grid(), backend=self.backend)

    def round(self, weight: Any, hessian: Any, dtype: Any) -> Any:
        """A `compression.numeric.rounding.Rounded` of a weight, fp32 (rows, cols); `dtype` is that of stored scales."""
        raise NotImplementedError

    def compress_stack(self, block: Any, layers: Any, seen: Any, note: str) -> None:
        calibration.blockwise.round_to_grid(block, self, layers, seen, note)
