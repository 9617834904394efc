"""Calibration text, and what it makes reach the layers."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
