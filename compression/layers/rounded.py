"""A weight on whole numbers around zero, for products of whole numbers."""

import copy
from typing import Any, Self

import torch

from compression.layers.activations import SMALLEST, TokenRange
from compression.layers.codes import Codes, check_sound
from compression.layers.dense import Dense
from compression.layers.linear import Linear
from compression.layers.parts import InputPart, dtype_named, name_of, part
from compression.layers.transforms import Hadamard, Scale
from compression.numeric import grouping, packing
from compression.numeric import whole_numbers as numbers
from compression.numeric.checks import check_size
from compression.numeric.grids import SignedGrid
from compression.numeric.grouping import Grid


@part("rounded", place="weight")
class Rounded(Codes):
    """W on whole numbers of `bits` bits, symmetric around zero, one fp32 scale to a row: for products with whole
    numbers on both sides (`activations.TokenRange`).

    Args:
        weight: (rows, cols).

    Raises:
        LayerError: a weight is not finite.
    """

    def __init__(self, weight: torch.Tensor, bits: int = 8):
        check_size("bits", bits, least=2, most=8)
        super().__init__(SignedGrid(bits=bits), *weight.shape, dtype=weight.dtype)
        if not weight.is_meta:
            check_sound("weight", weight)
            codes, params = grouping.quantize(self.grid, weight.detach())
            self.codes = packing.pack(codes, bits)
            for name, value in params.items():
                setattr(self, name, value)

    @classmethod
    def _of(cls, grid: Grid, rows: int, cols: int, *, dtype: torch.dtype, permuted: bool) -> "Rounded":
        return cls(torch.empty(rows, cols, dtype=dtype, device="meta"), grid.bits)

    @classmethod
    def empty(cls, rows: int, cols: int, *, bits: Any, dtype: Any) -> Self:  # type: ignore[override]
        return cls(torch.empty(rows, cols, dtype=dtype_named(dtype), device="meta"), bits)

    @property
    def settings(self) -> dict[str, Any]:
        return {"bits": self.grid.bits, "dtype": name_of(self.dtype)}


def whole_numbers(
    linear: torch.nn.Linear,
    step: torch.Tensor | float | None = None,
    *,
    bits: int = 8,
    scale: numbers.Scale = "float",
    input_part: InputPart | None = None,
) -> Linear:
    """A layer with weights and activations in whole numbers, its weight rounded to nearest.

    Args:
        step: of its activations; None for one of each token, found at run time.
        bits: of both.
        scale: of the weights; "power_of_two" for fixed point.
        input_part: what rounds its activations instead; the layer gets a copy.

    Raises:
        LayerError: a weight is not finite.
    """
    weight = Rounded(linear.weight, bits)
    if scale == "power_of_two":
        params = {"scales": numbers.power_of_two(weight.scales)}
        codes = weight.grid.encode(linear.weight, params)
        weight = Rounded.from_codes(codes, params, weight.grid, dtype=weight.dtype)  # type: ignore[assignment]
    entering = TokenRange(bits, step) if input_part is None else copy.deepcopy(input_part)
    return Linear(weight, linear.bias, input_part=entering)


def static_step(largest: torch.Tensor, bits: int = 8) -> float:
    """The step with which the largest of the absolute values (cols,) is the largest number."""
    return max(float(largest.amax()), SMALLEST) / (2 ** (bits - 1) - 1)


def scaled(linear: torch.nn.Linear, scales: torch.Tensor, bits: int, input_part: InputPart) -> Linear:
    """A layer as `whole_numbers` would have it with its inputs divided by `scales` (cols,), which it does itself."""
    own = scales.to(linear.weight)
    weight = Dense(Rounded(linear.weight * own, bits).value())
    return Linear(weight, linear.bias, input_part=[Scale(1 / own), input_part])


def transformed_inputs(linear: torch.nn.Linear, block: int) -> Linear:
    """A layer that computes the same behind a Hadamard transform of its inputs in blocks, its inverse in the weight."""
    first = Hadamard(block)
    weight = first.taken(linear.weight.detach().double()).to(linear.weight.dtype)
    return Linear(Dense(weight), linear.bias, input_part=first)


def rounded_numbers(
    linear: torch.nn.Linear | Linear,
    bits: int,
    activation_bits: int,
    clip: float = 1.0,
    step: float | None = None,
    *,
    searches: bool = False,
) -> Linear:
    """A layer with weights rounded to nearest and activations of each token rounded at run time; 16 bits stay.

    Args:
        linear: dense, or with linear maps of its inputs, behind which they are rounded.
        clip: share of the largest absolute value of a token that stays.
        step: of activations, found beforehand, clipping included; None for one of each token.
        searches: whether scales of weights are those of least squared error, with the largest weights cut off.

    Raises:
        LayerError: a weight is not finite.
    """
    made = Linear.of(linear)
    weight = made.weight_part if bits == 16 else Rounded(made.weight_part.value(), bits)
    if searches and isinstance(weight, Rounded) and not made.is_meta:
        dense, dtype = made.weight_part.value(), weight.dtype
        params = weight.grid.fit_clipped(dense)
        weight = Rounded.from_codes(weight.grid.encode(dense, params), params, weight.grid, dtype=dtype)
    before = () if made.input_part is None else (made.input_part,)
    entering = before if activation_bits == 16 else (*before, TokenRange(activation_bits, step, 1.0 if step else clip))
    return Linear(weight, made.bias, input_part=entering or None, output_part=made.output_part)
