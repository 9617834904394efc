"""Published formats of compressed checkpoints."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
