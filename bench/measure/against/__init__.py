"""A/B timing: the working tree against a commit."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
