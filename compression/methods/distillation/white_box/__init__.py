"""The teacher's distributions are at hand."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
