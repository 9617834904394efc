"""One file per method."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
