"""Weights and activations in outlier-victim pairs (`numeric.outlier_victim`)."""

from typing import Any, Self

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.layers.parts import InputPart, WeightPart, dtype_named, name_of, part, straight_through
from compression.numeric import outlier_victim
from compression.numeric.checks import FLOATS, check_finite, check_one_of, check_shape, check_size


@part("outlier_victim", place="weight")
class OutlierVictim(WeightPart):
    """W (rows, cols) in pairs of neighbours along the inputs: `codes` uint8 (rows, cols / 2), `scales` fp32 (rows,).

    Args:
        rows, cols: of W.
        dtype: in which products are taken.

    Raises:
        LayerError: cols is odd.

    Source: OliVe, arXiv 2304.07493. There is no kernel for it on CPUs and GPUs: products are those of the decoded
    weight.
    """

    takes_others = True

    def __init__(self, rows: int, cols: int, *, dtype: torch.dtype):
        super().__init__()
        check_size("in_features", cols)
        check_size("out_features", rows)
        outlier_victim.check_pairs(cols)
        check_one_of("dtype", dtype, FLOATS)
        self._shape, self._dtype = (rows, cols), dtype
        self.register_buffer("codes", torch.empty(rows, cols // 2, dtype=torch.uint8, device="meta"))
        self.register_buffer("scales", torch.empty(rows, device="meta"))

    @classmethod
    def from_weight(cls, weight: Tensor) -> "OutlierVictim":
        """Round a weight (rows, cols), the scale of each row searched for.

        Raises:
            LayerError: a weight is not finite, or cols is odd.
        """
        check_finite("the weight", weight)
        outlier_victim.check_pairs(weight.shape[1])
        return cls._of(weight, outlier_victim.fit(weight), weight.dtype)

    @classmethod
    def _of(cls, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> "OutlierVictim":
        made = cls(*weight.shape, dtype=dtype)
        made.codes, made.scales = outlier_victim.encode(weight.detach().float() / scales[:, None]), scales
        return made

    @classmethod
    def empty(cls, rows: int, cols: int, *, dtype: Any) -> Self:
        return cls(rows, cols, dtype=dtype_named(dtype))

    @property
    def settings(self) -> dict[str, Any]:
        return {"dtype": name_of(self.dtype)}

    @property
    def words(self) -> str:
        return "4 bits in outlier-victim pairs, one scale per channel"

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def check(self) -> None:
        rows, cols = self.shape
        codes = check_shape(self, "codes", (rows, cols // 2), {torch.uint8})
        scales = check_shape(self, "scales", (rows,), {torch.float32})
        check_finite("scales", scales)
        if not codes.is_meta and not outlier_victim.sound(codes):
            raise LayerError("codes hold a pair of two victims, or one that stands beside no outlier")
        if not codes.is_meta and not (scales > 0).all():
            raise LayerError("scales must be above 0")

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        return outlier_victim.decode(self.codes).mul_(self.scales[:, None]).to(dtype or self.dtype)

    def lookup(self, places: Tensor) -> Tensor:
        """Its rows alone are decoded."""
        flat = places.reshape(-1)
        rows = outlier_victim.decode(self.codes[flat]).mul_(self.scales[flat, None])
        return rows.to(self.dtype).view(*places.shape, self.shape[1])

    def rows(self, kept: Tensor) -> "OutlierVictim":
        """The same bits."""
        places = kept.to(self.codes.device)
        made = OutlierVictim(len(kept), self.shape[1], dtype=self.dtype)
        made.codes, made.scales = self.codes[places], self.scales[places]
        return made

    def columns(self, kept: Tensor) -> "OutlierVictim":
        """The same scales; the same bits where whole pairs are left. Raises LayerError: an odd number is left."""
        outlier_victim.check_pairs(len(kept))
        return self._of(self.value(torch.float32)[:, kept.to(self.codes.device)], self.scales, self.dtype)

    def again(self, weight: Tensor) -> "OutlierVictim":
        """Rounded anew, the scales searched for. Raises LayerError as `from_weight`."""
        return self.from_weight(weight.to(self.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(fn, recurse)


@part("outlier_victim_range", place="input")
class OutlierVictimRange(InputPart):
    """Activations in outlier-victim pairs of neighbouring channels, under one scale found on calibration text.

    Args:
        step: the scale, fp32 ().

    Source: OliVe, arXiv 2304.07493, section 3.
    """

    simulated = True

    def __init__(self, step: Tensor | float):
        super().__init__()
        self.register_buffer("step", torch.as_tensor(step, dtype=torch.float32).detach().reshape(()))
        if not self.step.is_meta:
            self.check()

    @classmethod
    def fitted(cls, inputs: Tensor) -> Self:
        """For inputs like these, fp32 (tokens, cols). Raises LayerError: one is not finite."""
        check_finite("an input of the calibration text", inputs)
        return cls(outlier_victim.fit(inputs.reshape(1, -1))[0])

    @classmethod
    def empty(cls, rows: int, cols: int) -> Self:
        outlier_victim.check_pairs(cols)
        return cls(torch.empty((), device="meta"))

    @property
    def words(self) -> str:
        return "activations in 4 bits in outlier-victim pairs, one scale per layer"

    def check(self) -> None:
        check_finite("step", check_shape(self, "step", (), {torch.float32}))
        if not self.step.is_meta and not self.step > 0:
            raise LayerError(f"step={float(self.step)} must be above 0")

    def columns(self, kept: Tensor) -> "OutlierVictimRange":
        """Raises LayerError: one of a pair goes, which would change what the other becomes."""
        pairs = kept.cpu().view(-1, 2) if len(kept) % 2 == 0 else None
        if pairs is None or not ((pairs[:, 0] % 2 == 0) & (pairs[:, 1] == pairs[:, 0] + 1)).all():
            raise LayerError("its inputs are rounded in pairs, which go whole; remove before quantizing")
        return self

    def forward(self, x: Tensor) -> Tensor:
        near = outlier_victim.rounded(x.detach().float() / self.step)
        return straight_through(x, near.mul_(self.step).to(x.dtype))
