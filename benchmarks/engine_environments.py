"""Environments for the engines that serve checkpoints, made from nothing; `tox -e engines` uses them.

    python benchmarks/engine_environments.py FOLDER [--engines vllm,llama.cpp] [--python python3]

Each engine gets a virtual environment FOLDER/NAME with what `bench.measure.engines.environments` says that it needs.
A complete one is kept. One that was begun, or that has other versions, is made anew. The last lines that are printed
name the Pythons, for a shell and for `--runtime-python`.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from bench.measure.engines.environments import ENGINES, has_module

OWN = ("vllm", "llama.cpp")  # engines that want an environment of their own
MARK = "complete"  # a file in an environment, with the requirements that it was made for


def make(name: str, folder: Path, python: str = sys.executable) -> Path:
    """The Python of an engine's environment, which is made if it is not there.

    Raises:
        SystemExit: pip cannot install the engine, or Python finds nothing of it afterwards.
    """
    need = ENGINES[name]
    target = folder / name
    made, mark = target / "bin" / "python", target / MARK
    if mark.exists() and mark.read_text() == need.command and has_module(made, need.module):
        return made
    print(f"making {target}: {need.command}", file=sys.stderr, flush=True)
    variables = {key: value for key, value in os.environ.items() if key not in ("PIP_CONSTRAINT", "PYTHONPATH")}
    steps = [[python, "-m", "venv", "--clear", target], [made, "-m", "pip", "install", "-q", *need.install]]
    if need.uninstall:
        steps.append([made, "-m", "pip", "uninstall", "-q", "-y", *need.uninstall])
    for step in steps:
        done = subprocess.run(list(map(str, step)), env=variables, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            last = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise SystemExit(
                f"{' '.join(map(str, step))} must succeed, but ended with status {done.returncode}: {last}"
            )
    if not has_module(made, need.module):
        raise SystemExit(f"{made} must have the module {need.module} after {need.command}, but has not")
    mark.write_text(need.command)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engines", default=",".join(OWN), help=f"of {', '.join(ENGINES)}; default %(default)s")
    parser.add_argument("--python", default=sys.executable, help="makes the environments; default this one")
    options = parser.parse_args()
    names = options.engines.split(",")
    if unknown := set(names) - set(ENGINES):
        parser.error(f"engines must be of {', '.join(ENGINES)}, not {', '.join(sorted(unknown))}")
    found = {name: make(name, options.folder.absolute(), options.python) for name in names}
    for name, python in found.items():
        print(f"export {ENGINES[name].variable}={python}")
    print(" ".join(f"--runtime-python {name}={python}" for name, python in found.items()))


if __name__ == "__main__":
    main()
