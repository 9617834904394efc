"""Bases and artefacts on disk."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
