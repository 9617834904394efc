"""The project's own kernel for tables of up to 4 bits on CPU (`lut4`), for layers."""

import torch
from torch import Tensor

from compression.layers.kernels import lut4
from compression.layers.kernels.kernel import Accepts, Kernel, LayerSpec, Product, canonical
from compression.numeric import packing
from compression.numeric.grouping import Params


def _lut4_refuses(spec: LayerSpec) -> str | None:
    if not lut4.available():
        return lut4.reason()
    if not lut4.supports(spec.out_features, spec.in_features, spec.group):
        return f"{spec.out_features} x {spec.in_features} in groups of {spec.group} does not tile"
    return None


def _lut4_bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    scales, zeros = spec.grid.expand(params, spec.out_features, spec.in_features)
    zeros = None if zeros is None else zeros.contiguous()
    table = torch.arange(16, dtype=torch.float32)  # levels that no code of fewer bits names go on as whole numbers do
    table[: 2**spec.grid.bits] = spec.grid.table()
    return lut4.bind(layout, table, scales.contiguous(), zeros, spec.group)


def _lut4_pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    """Codes of 2 and 3 bits take 4 each in memory: what is stored is canonical all the same."""
    rows = max(1, 2**16 // spec.in_features)  # at a time: 3 bits are taken apart in words of 8 bytes to a code
    return torch.cat([lut4.pack(canonical(part, spec)) for part in codes.split(rows)])


def _lut4_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    return packing.pack(lut4.unpack(layout, spec.in_features), spec.grid.bits)


LUT4 = Kernel(
    name="lut4", library="native", refuses=_lut4_refuses,
    accepts=Accepts(words="weights of at most 4 bits on CPU only", bits=(1, 2, 3, 4), devices=("cpu",)),
    pack=_lut4_pack, unpack=_lut4_unpack,
    bind=_lut4_bind,
    max_rows=lambda spec: 256,  # beyond, unpacking once and an fp32 product is faster
)  # fmt: skip
