"""Single weights set to zero."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
