"""Packages whose modules are imported on first use, so that declarations, results and commands start without torch."""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType


def submodules(package: str) -> Callable[[str], ModuleType]:
    """The `__getattr__` of a package (PEP 562): its modules as attributes, each imported when it is first read.

    `from compression import numeric` costs nothing; `numeric.rounding` imports the module.
    """

    def find(name: str) -> ModuleType:
        full = f"{package}.{name}"
        if name.startswith("_") or importlib.util.find_spec(full) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(full)

    return find
