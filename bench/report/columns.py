"""Tables for a terminal of 120 columns: blocks of columns that fit, long heads and cells on several lines.

Texts are printable already (`compression.files.terminal`).
"""

import re
from collections.abc import Iterable, Sequence

WIDTH = 120
_LABEL = 46  # of the labels at most; longer ones go on in the next line
_GAP = 2
_HEAD = 20  # up to which a head makes its column wider than the cells do

Line = tuple[str, Sequence[str]]  # label and cells; a line without cells is a heading over the whole width


def blocks(heads: Sequence[str], lines: Sequence[Line], *, width: int = WIDTH) -> list[str]:
    """The lines of a table, none longer than `width`: where not all columns fit, several blocks with the same labels.

    >>> print("\\n".join(blocks(["fp16", "nf4"], [("size (MiB)", ["10", "3.3"]), ("ms", ["4", "2"])], width=17)))
                fp16
    size (MiB)    10
    ms             4
    <BLANKLINE>
                nf4
    size (MiB)  3.3
    ms            2
    """
    label = min(_label(lines), 2 * width // 3)
    room = width - label - _GAP
    widths = [min(room, each) for each in _widths(heads, lines)]
    found: list[str] = []
    for places in _fitting(widths, width - label):
        found += [""] if found else []
        found += _row(["", *(heads[place] for place in places)], [label, *(widths[place] for place in places)])
        for name, cells in lines:
            if cells:
                found += _row([name, *(cells[place] for place in places)],
                              [label, *(widths[place] for place in places)])  # fmt: skip
            else:
                found += wrapped(name, width)
    return found


def needed(heads: Sequence[str], lines: Sequence[Line]) -> int:
    """The columns of a terminal that all columns of a table need beside each other.

    >>> needed(["fp16", "nf4"], [("size (MiB)", ["10", "3.3"])])
    21
    """
    return _label(lines) + sum(_GAP + each for each in _widths(heads, lines))


def _label(lines: Sequence[Line]) -> int:
    return max([0, *(min(len(name), _LABEL) for name, cells in lines if cells)])


def _widths(heads: Sequence[str], lines: Sequence[Line]) -> list[int]:
    """Of each column: that of its longest cell, or of its head, where that is short."""
    longest = [max([1, *(len(cells[place]) for _, cells in lines if cells)]) for place in range(len(heads))]
    return [max(cells, min(len(head), _HEAD)) for head, cells in zip(heads, longest, strict=True)]


def wrapped(text: str, width: int = WIDTH) -> list[str]:
    """A text in lines of at most `width`, broken behind spaces, commas and hyphens where there are any.

    >>> wrapped("gptq(bits=3,group_size=64)", 14)
    ['gptq(bits=3,', 'group_size=64)']
    """
    lines = [""]
    for word in re.findall(r"[^\s,\-→]*[\s,\-→]?", text):
        if len((lines[-1] + word).rstrip()) > width and lines[-1]:
            lines.append("")
        while len((lines[-1] + word).rstrip()) > width:
            lines[-1:], word = [word[:width], ""], word[width:]
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _fitting(widths: Sequence[int], room: int) -> Iterable[list[int]]:
    """Places of columns, so many at a time as there is room for."""
    places: list[int] = []
    for place in range(len(widths)):
        if places and sum(_GAP + widths[each] for each in [*places, place]) > room:
            yield places
            places = []
        places.append(place)
    yield places


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One line of a table, or several: the first cell to the left, the others to the right."""
    parts = [[cell] if len(cell) <= size else wrapped(cell, size) for cell, size in zip(cells, widths, strict=True)]
    height = max(map(len, parts))
    found = []
    for at in range(height):
        texts = [part[at] if at < len(part) else "" for part in parts]
        shown = [texts[0].ljust(widths[0]), *map(str.rjust, texts[1:], widths[1:])]
        found.append((" " * _GAP).join(shown).rstrip())
    return found
