"""Files that outlive a kill, and strict reading of what others wrote."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
