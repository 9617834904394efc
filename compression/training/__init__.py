"""Teachers, downstream tasks, and the trainer."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
