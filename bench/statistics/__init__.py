"""Statistics over plain arrays of numbers."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
