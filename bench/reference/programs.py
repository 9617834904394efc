"""Small programs over lists of whole numbers, each with a docstring that says what it does and tests that check it.

A program changes the list `x` once or twice, held-out ones up to three times, and returns the list or a figure of it.
The hash of its docstring decides which split a program belongs to.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.reference.world import Draw

_CHANGES: dict[str, tuple[str, Callable[[list[int], int], list[int]]]] = {  # what the docstring says: code, meaning
    "Add {k} to every item.": ("x = [n + {k} for n in x]", lambda x, k: [n + k for n in x]),
    "Multiply every item by {k}.": ("x = [n * {k} for n in x]", lambda x, k: [n * k for n in x]),
    "Keep the items above {k}.": ("x = [n for n in x if n > {k}]", lambda x, k: [n for n in x if n > k]),
    "Keep the items below {k}.": ("x = [n for n in x if n < {k}]", lambda x, k: [n for n in x if n < k]),
    "Drop the first {k} items.": ("x = x[ {k} :]", lambda x, k: x[k:]),
    "Append {k} at the end.": ("x = x + [ {k} ]", lambda x, k: [*x, k]),
    "Repeat the list {k} times.": ("x = x * {k}", lambda x, k: x * k),
    "Sort the items.": ("x = sorted(x)", lambda x, k: sorted(x)),
    "Reverse the list.": ("x = x[::-1]", lambda x, k: x[::-1]),
}
_ENDS: dict[str, tuple[str, Callable[[list[int]], Any]]] = {
    "Return the list.": ("return x", lambda x: x),
    "Return the sum.": ("return sum(x)", sum),
    "Return the length.": ("return len(x)", len),
    "Return the largest item or 0.": ("return max(x, default=0)", lambda x: max(x, default=0)),
    "Return the smallest item or 0.": ("return min(x, default=0)", lambda x: min(x, default=0)),
}


@dataclass(frozen=True, kw_only=True)
class Program:
    """`prompt` ends with the docstring, `body` completes the function `solve`, `tests` are assert statements."""

    prompt: str
    body: str
    tests: tuple[str, ...]

    @property
    def split(self) -> str:
        """The split it belongs to, by its text: one in eight is validation, one in eight test."""
        return {0: "validation", 1: "test"}.get(hashlib.sha256(self.prompt.encode()).digest()[0] % 8, "train")


def program(draw: Draw, split: str) -> Program:
    """A program of the split, with three tests."""
    while (made := _program(draw, 2 if split == "train" else 3)).split != split:
        pass
    return made


def _program(draw: Draw, most: int) -> Program:
    chosen = [(draw.one(list(_CHANGES)), draw.between(2, 9)) for _ in range(draw.between(1, most))]
    end = draw.one(list(_ENDS))
    said = " ".join([*(what.format(k=k) for what, k in chosen), end])
    lines = [*(_CHANGES[what][0].format(k=k) for what, k in chosen), _ENDS[end][0]]

    def meaning(x: list[int]) -> Any:
        for what, k in chosen:
            x = _CHANGES[what][1](x, k)
        return _ENDS[end][1](x)

    inputs = [[draw.between(0, 12) for _ in range(length)] for length in (6, 9, 12)]
    return Program(
        prompt=f'def solve(x):\n    """{said}"""\n',
        body="".join(f"    {line}\n" for line in lines),
        tests=tuple(f"assert solve({x}) == {meaning(x)}" for x in inputs),
    )
