"""What the tests of the published formats share: descriptions as config.json holds them."""

from compression.checkpoints.formats.description import Published

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False,
        "checkpoint_format": "gptq_v2"}  # fmt: skip
SYMMETRIC = GPTQ | {"sym": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
NAME = "model.layers.0.mlp.up_proj"


def describe(bits, version):
    return Published(quant_method="gptq", bits=bits, group_size=16, symmetric=False, version=version)
