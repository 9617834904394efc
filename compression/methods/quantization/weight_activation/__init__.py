"""Weights and activations on a grid."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
