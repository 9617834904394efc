"""Which kernel a layer gets on a device.

A kernel keeps the codes in a layout of its own: `pack` makes it from the canonical codes and `unpack` gives exactly
those back, so that a layer holds its codes once, in the layout that it computes with. Kernels are tried in the order of
`KERNELS`; the first that takes a layer is used, for up to `max_rows` rows of input. Beyond that, and where none takes
it, the weight is made dense and multiplied ("dequantize", "densify").
"""

import torch

from compression.errors import BackendError
from compression.layers.kernels import lut4
from compression.layers.kernels.bitsandbytes import BNB4, BNB8
from compression.layers.kernels.gptqmodel import GPTQMODEL
from compression.layers.kernels.integer_products import W8A8
from compression.layers.kernels.kernel import Kernel, LayerSpec
from compression.layers.kernels.lut4_product import LUT4
from compression.layers.kernels.torch_products import INT4, INT8, SEMI_STRUCTURED

KERNELS: tuple[Kernel, ...] = (LUT4, INT4, INT8, W8A8, BNB4, BNB8, GPTQMODEL, SEMI_STRUCTURED)
BACKENDS = ("auto", *dict.fromkeys(kernel.library for kernel in KERNELS))  # that a layer can ask for


def choose(spec: LayerSpec) -> tuple[Kernel | None, dict[str, str]]:
    """The kernel of a layer, or None for dequantize-and-multiply, and why the others were refused.

    Raises:
        BackendError: the layer names a backend, and that has no kernel for it here.
    """
    refused = {}
    for kernel in KERNELS:
        wanted = spec.backend in ("auto", kernel.library)
        reason = kernel.refusal(spec) if wanted else f"backend={spec.backend} was asked for"
        if reason is None:
            return kernel, refused
        refused[kernel.name] = reason
    if spec.backend not in ("auto", "torch"):
        reasons = "; ".join(f"{k.name}: {refused[k.name]}" for k in KERNELS if k.library == spec.backend)
        raise BackendError(f"backend={spec.backend!r} cannot take a {spec.words} layer of {spec.out_features} x "
                           f"{spec.in_features} in {spec.dtype} on {spec.device}: {reasons}; backend=auto "
                           "takes the fastest there is")  # fmt: skip
    return None, refused


def serves(library: str, kind: str) -> bool:
    """Whether a library has kernels for weights of a kind, wherever they run."""
    return library == "auto" or any(each.library == library and kind in each.accepts.weight for each in KERNELS)


def warm_up(device: str) -> None:
    """Compile what is compiled at first use, so that it falls on no clock."""
    if torch.device(device).type == "cpu":
        lut4.available()
