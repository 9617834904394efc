"""What models are measured on: texts, tasks, and collections of documents."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
