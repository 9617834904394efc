"""Layers, heads and neurons removed."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
