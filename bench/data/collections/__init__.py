"""Collections of documents and questions for retrieval."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
