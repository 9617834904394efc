"""What stands in a model for a linear layer, and how it is stored."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
