"""Engines that serve an exported checkpoint, each in a process of its own Python environment."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
