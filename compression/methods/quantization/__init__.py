"""Fewer bits per value."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
