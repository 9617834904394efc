"""The scripts of `benchmarks/` as modules: tests hold them to the code that they measure."""

import functools
import importlib.util
import sys
from types import ModuleType

from processes import REPOSITORY


@functools.cache
def benchmark(name: str) -> ModuleType:
    """The module of `benchmarks/NAME.py`."""
    spec = importlib.util.spec_from_file_location(f"benchmarks.{name}", REPOSITORY / "benchmarks" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
