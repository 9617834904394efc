"""The products of stored layers."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
