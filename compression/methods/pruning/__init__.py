"""Weights and structures removed."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
