"""Decoders: their blocks, their edits, their random shapes."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
