"""Where a run took place: device, data sheets, CPU wait, repository."""

from compression.lazy import submodules

__getattr__ = submodules(__name__)
