"""Quantized keys and values behind the cache classes of transformers.

`policy` says how they are stored, `cache` stores them, `replaying` lets one pass see what token after token would.
"""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
