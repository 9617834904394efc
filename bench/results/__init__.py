"""Records of what was measured: rows, items, layers, and the journal that holds them."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
