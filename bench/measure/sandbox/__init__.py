"""Model-written programs, run in a sandbox."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
