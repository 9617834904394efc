"""What engines quantize while they load a model."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
