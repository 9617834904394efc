"""Keys and values in fewer bits."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
