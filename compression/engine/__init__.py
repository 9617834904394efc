"""Runs recipes: plan, schedule, run, stream."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
