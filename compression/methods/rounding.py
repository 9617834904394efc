"""`rounding=nearest|gptq`, for methods that round weights on grids whose parameters are found from the weights alone.

A method makes each layer rounded to nearest. With `gptq`, the same grid and the same stored parameters get the codes
that GPTQ chooses by what the layer reads (`numeric.rounding.Factored`): all that follows, from products to exports,
is that of the nearest form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from compression import calibration, layers
from compression.errors import LayerError, RecipeError
from compression.methods.base import Context, Quantizer, _naming
from compression.recipes.registry import Method
from compression.workers import dealt

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compression.architectures.decoder import Block
    from compression.calibration.capture import Seen
    from compression.calibration.observers import Reached
    from compression.layers.linear import Linear

    Make = Callable[[str, Any], Linear]  # of a full name, and the layer that stands there


@dataclass(frozen=True, kw_only=True)
class Rounding(Method):
    """The parameters, and `round_block` for block methods. Layer methods are `RoundingQuantizer`s."""

    rounding: Literal["nearest", "gptq"] = "nearest"  # gptq: the weights to come make up for the error so far
    damp: float = 0.01  # of rounding=gptq: share of the mean of the Hessian's diagonal that is added to it

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp <= 1:
            raise RecipeError(f"{self.info.name}(damp={self.damp}): allowed are 0 to 1; the paper takes 0.01")

    @property
    def fits_hessian(self) -> bool:
        return self.rounding == "gptq"

    def round_block(self, block: "Block", seen: "Seen", context: Context, make: "Make") -> None:
        """Put what `make` makes of each linear of a block in its place, with weights rounded as is set.

        Args:
            make: of (full name, layer as it stands) a layer with its weight rounded to nearest, and whatever else it is
                to have. What the layer does to its inputs before, such as an online rotation, must stand in its
                `input_part` by now: the text runs through the block once more, and GPTQ sees what reaches the weights.
        """
        linears = list(block.linears())
        if self.rounding == "nearest":
            for name, linear in linears:
                block.replace(name, make(name, linear))
            return
        reached = seen.at_weights(calibration.observers.Reaching)
        owners = dealt([linear.out_features * linear.in_features**2 for _, linear in linears], context.workers.count)
        jobs = [partial(self._made, make, name, linear, reached[name]) for name, linear in linears]
        for (name, _), layer in zip(linears, list(context.workers.run(owners, jobs)), strict=True):
            block.replace(name, layer)

    def _made(self, make: "Make", name: str, linear: Any, reached: "Reached") -> "Linear":
        with _naming(name):
            dense = linear.weight_part.value() if isinstance(linear, layers.Linear) else linear.weight
            return rounded_by(make(name, linear), dense, reached, self.damp)


@dataclass(frozen=True, kw_only=True)
class RoundingQuantizer(Rounding, Quantizer):
    """A layer method with these parameters; its layers go through `settled`.

    Subclasses have fields `samples` and `sequence_length`, and are `static` where they read text for ranges of
    activations.
    """

    @property
    def static(self) -> bool:
        return False

    @property
    def calibration(self) -> tuple[int, int] | None:
        return (self.samples, self.sequence_length) if self.static or self.fits_hessian else None  # type: ignore[attr-defined]

    @property
    def measured(self) -> Any:
        """Of `rounding=gptq` a `Reached`, else the largest values (cols,) of those that are `static`."""
        if self.fits_hessian:
            return calibration.observers.Reaching
        return calibration.observers.Largest if self.static else None

    def largest(self, inputs: "Tensor | Reached | None") -> "Tensor":
        """Of what was measured. Raises LayerError: nothing was."""
        if inputs is None:
            raise LayerError("no text was read for its static range; set activations=static for the whole recipe, and "
                             "token for the layers that are to have it")  # fmt: skip
        return getattr(inputs, "largest", inputs)

    def settled(self, layer: "Linear", linear: "nn.Linear", inputs: Any) -> "Linear":
        """A layer rounded to nearest, with its weights as `rounding` is set."""
        return rounded_by(layer, linear.weight, inputs, self.damp) if self.fits_hessian else layer


def rounded_by(layer: "Linear", weight: "Tensor", reached: "Reached", damp: float = 0.01) -> "Linear":
    """A layer rounded to nearest, with the codes that GPTQ chooses instead; scales and all else stay.

    Args:
        weight: (rows, cols), what was rounded.
        reached: of what reaches the weight.
    """
    part = layer.weight_part
    assert isinstance(part, layers.codes.Codes) and part.permutation is None
    params = part.parameters_of_grid()
    codes = reached.factored(damp).codes(weight, part.grid, params)
    layer.weight_part = type(part).from_codes(codes, params, part.grid, dtype=part.dtype)
    return layer
