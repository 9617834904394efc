"""How measurements are made: generation, perplexity, scoring, RAG, judging, memory."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
