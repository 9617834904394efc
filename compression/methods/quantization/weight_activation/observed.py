"""Static ranges of activations by an observer of calibration text: what methods of whole numbers share."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from compression import calibration
from compression.errors import LayerError, RecipeError
from compression.recipes.registry import Method

if TYPE_CHECKING:
    from compression.calibration.ranges import Ranges


@dataclass(frozen=True, kw_only=True)
class Observed(Method):
    """Subclasses have a field `activations`, "token" where no range is static, and `samples`, `sequence_length`."""

    observer: Literal["min_max", "moving_average", "percentile", "mse"] = "min_max"  # what static ranges come from

    def __post_init__(self) -> None:
        super().__post_init__()
        activations = getattr(self, "activations", None)
        if self.observer != "min_max" and activations == "token":
            raise RecipeError(f"{self.info.name}(observer={self.observer}): ranges of tokens are found at run time, "
                              "and need no observer; leave it out, or set activations to what is static")  # fmt: skip

    def ranging(self, **more: Any) -> Any:
        """Makes the observer of inputs whose value are `Ranges`."""
        tokens = self.samples * self.sequence_length  # type: ignore[attr-defined]
        return partial(calibration.ranges.Ranging, rule=self.observer, tokens=tokens, **more)

    def ranges_of(self, inputs: Any) -> "Ranges":
        """What was measured of the inputs of a layer. Raises LayerError: nothing was, or by another observer."""
        if not isinstance(inputs, calibration.ranges.Ranges):
            raise LayerError("no text was read for its static range; set activations=static for the whole recipe, and "
                             "token for the layers that are to have it")  # fmt: skip
        if inputs.rule != self.observer:
            raise LayerError(f"its inputs were observed by {inputs.rule}, not {self.observer}; set observer="
                             f"{self.observer} for the whole recipe")  # fmt: skip
        return inputs
