"""What the tests of the published formats share: descriptions as config.json holds them, and a layer dequantized."""

import torch
from packed_layers import coded_linear

from compression.checkpoints.formats.description import Published
from compression.numeric import packing
from compression.numeric.grids import AffineGrid

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False,
        "checkpoint_format": "gptq_v2"}  # fmt: skip
SYMMETRIC = GPTQ | {"sym": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
NAME = "model.layers.0.mlp.up_proj"


def dequantized(stored, bits, group_size):
    """fp16 weight of what a format read, through codes."""
    grid = AffineGrid(bits=bits, group_size=group_size, symmetric=False)
    codes = packing.unpack(stored.codes, bits, stored.codes.shape[1] * 8 // bits)
    params = {"scales": stored.scales, "zero_points": packing.pack(stored.zeros, bits)}
    return coded_linear(codes, params, None, grid, dtype=torch.float16, permutation=stored.permutation).dequantize()


def describe(bits, version):
    return Published(quant_method="gptq", bits=bits, group_size=16, symmetric=False, version=version)
