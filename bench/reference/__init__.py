"""The embedded reference: a small trained model, a teacher twice its size, and the generated world they learnt from.

`world` generates the text, `train` makes the weights, and the folders `student` and `teacher` beside this file hold
them in the format of transformers. Importing this package imports neither torch nor transformers.
"""

from pathlib import Path

NAMES = ("student", "teacher")


def folder(name: str) -> Path:
    """The checkpoint folder of "student" or "teacher"; raises ValueError for any other name."""
    if name not in NAMES:
        raise ValueError(f"name={name!r} is no embedded reference; there are {', '.join(NAMES)}")
    return Path(__file__).parent / name
