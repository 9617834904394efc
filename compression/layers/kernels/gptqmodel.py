"""Products of GPTQModel, by its own selection."""

import torch
from torch import Tensor

from compression import devices
from compression.errors import BackendError, install_command
from compression.layers.kernels.kernel import Accepts, Kernel, LayerSpec, Product, unlimited
from compression.numeric import packing
from compression.numeric.grids import AffineGrid
from compression.numeric.grouping import Params


def _gptqmodel_kernel(spec: LayerSpec) -> type:
    """The class of GPTQModel that its own selection takes for the layer.

    Raises:
        ImportError: it is not installed, or does not import.
        ValueError: none of its kernels takes the layer here.
    """
    from gptqmodel.models._const import DEVICE
    from gptqmodel.utils.importer import select_quant_linear

    common = {"bits": spec.grid.bits, "group_size": spec.grid.group_size, "desc_act": False,
              "sym": spec.grid.symmetric, "pack_dtype": torch.int32, "dtype": spec.dtype}  # fmt: skip
    found = select_quant_linear(device=DEVICE(spec.device_type), **common)
    ok, why = found.validate(in_features=spec.in_features, out_features=spec.out_features, **common)
    if not ok:
        raise ValueError(str(why))
    return found


def _gptqmodel_refuses(spec: LayerSpec) -> str | None:
    if spec.backend != "gptqmodel":
        return "only when asked for by backend=gptqmodel"
    if spec.grid.float_zeros:
        return "affine weights with whole zero points only"
    if spec.in_features * spec.grid.bits % 32 or spec.out_features * spec.grid.bits % 32:
        return f"{spec.out_features} x {spec.in_features} in {spec.grid.bits} bits do not fill whole 32-bit words"
    try:
        _gptqmodel_kernel(spec)
    except ImportError as error:
        return f"gptqmodel cannot be imported ({error}); {install_command('gptqmodel')}"
    except (ValueError, NotImplementedError) as error:
        return f"none of its kernels takes it: {error}"
    return None


def _gptqmodel_pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    return packing.to_words(codes).t().contiguous()


def _gptqmodel_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    return packing.to_bytes(layout.t())


def _gptqmodel_bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    scales, zeros = spec.grid.expand(params, spec.out_features, spec.in_features)
    kind = _gptqmodel_kernel(spec)
    layer = kind(
        bits=spec.grid.bits, group_size=spec.grid.group_size, desc_act=False, sym=spec.grid.symmetric, bias=False,
        in_features=spec.in_features, out_features=spec.out_features, pack_dtype=torch.int32, register_buffers=True,
    ).eval()  # fmt: skip
    qzeros = packing.to_words(packing.pack(zeros.to(torch.uint8).t().contiguous(), spec.grid.bits))
    layer.qweight = layout if spec.device_type == "cpu" else layout.clone()  # CUDA kernels may reorder it in place
    layer.qzeros = (qzeros if kind.REQUIRES_FORMAT_V2 else packing.shift_zeros(qzeros, spec.grid.bits, -1)).contiguous()
    layer.scales = scales.t().to(spec.dtype).contiguous()
    layer.g_idx = (torch.arange(spec.in_features, device=layout.device) // spec.group).int()
    layer.qzero_format(format=2 if kind.REQUIRES_FORMAT_V2 else 1)
    layer.post_init()

    def product(x: Tensor) -> Tensor:
        with devices.on(x.device):  # Triton launches on the current device
            return layer(x)

    try:
        with torch.no_grad():  # some take their own layout at the first product
            product(torch.zeros(1, spec.in_features, dtype=spec.dtype, device=layout.device))
    except RuntimeError as error:  # a kernel that says it takes a layer, and does not
        raise BackendError(f"{kind.__name__} of gptqmodel fails on {spec.out_features} x {spec.in_features} in groups "
                           f"of {spec.group}: {error}; backend=auto takes the fastest there is") from error  # fmt: skip
    product.held = tuple(t for t in layer.buffers() if t is not layout)  # type: ignore[attr-defined]
    return product


GPTQMODEL = Kernel(
    name="gptqmodel", library="gptqmodel", refuses=_gptqmodel_refuses,
    accepts=Accepts(
        words="affine weights with whole zero points only", grids=(AffineGrid,),
        dtypes=(torch.float16, torch.bfloat16),
    ), pack=_gptqmodel_pack, unpack=_gptqmodel_unpack,
    bind=_gptqmodel_bind, max_rows=unlimited,
)  # fmt: skip
