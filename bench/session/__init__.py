"""How pytest drives a run: the plugin, its options, the models and inputs of a session, its recorder and summary."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
