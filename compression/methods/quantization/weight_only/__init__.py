"""Weights on a grid; activations stay as they are."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
