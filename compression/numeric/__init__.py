"""Tensors in, tensors out: packing, grids, rounding, sparsity, losses. Imports torch alone."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
