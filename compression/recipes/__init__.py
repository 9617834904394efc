"""Recipes as text, value and JSON, and the registry of methods. Imports no torch."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
