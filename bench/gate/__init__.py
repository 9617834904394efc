"""Pass or fail: rows compared with baselines."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
