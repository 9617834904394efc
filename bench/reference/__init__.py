"""The embedded reference: a small model, a teacher twice its size, and the generated world they were trained on.

`world` generates the text, `train` makes the weights, and the folders `student` and `teacher` beside this file hold
them in the format of transformers. Its modules are imported when they are first used.
"""

from pathlib import Path

from compression.lazy import submodules

__getattr__ = submodules(__name__)
NAMES = ("student", "teacher")


def folder(name: str) -> Path:
    """The checkpoint folder of "student" or "teacher"; raises ValueError for any other name."""
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, not {name!r}")
    return Path(__file__).parent / name
