"""The tasks that models are scored on, and where their data comes from."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
