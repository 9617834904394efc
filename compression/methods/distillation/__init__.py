"""Training on what a teacher says."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
