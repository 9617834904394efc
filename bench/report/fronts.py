"""Pareto fronts: the points that no other point beats."""

import math
from collections.abc import Mapping, Sequence


def front(points: Mapping[str, Sequence[float]]) -> dict[str, str | None]:
    """For each name None if its point is on the Pareto front, else the name of a point that dominates it.

    All coordinates are better when lower. One point dominates another if it is nowhere above it and somewhere below;
    equal points do not. The dominating point that is named is itself on the front: the first one in order of the names'
    coordinates. Raises ValueError for points of different lengths, and for coordinates that are not finite.

    >>> front({"a": (1, 3), "b": (2, 2), "c": (2, 4)})
    {'a': None, 'b': None, 'c': 'a'}
    """
    for name, point in points.items():
        if len(point) != len(next(iter(points.values()))):
            raise ValueError(f"point {name!r} has {len(point)} coordinates; all points must have as many as the first")
        if not all(map(math.isfinite, point)):
            raise ValueError(f"point {name!r} has coordinates {tuple(point)}; all must be finite")
    found: dict[str, str | None] = {}
    kept: list[str] = []
    for name in sorted(points, key=lambda each: tuple(points[each])):  # what dominates a point comes before it
        found[name] = next((other for other in kept if dominates(points[other], points[name])), None)
        if found[name] is None:
            kept.append(name)
    return {name: found[name] for name in points}


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a point is nowhere above another and somewhere below."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
