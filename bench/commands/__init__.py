"""The commands of `python -m bench`."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
