"""Tasks scored through lm-eval, with shared prompt prefixes computed once."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
