"""One sum over the calibration text, the same to the last bit however many processes shared the text.

The samples lie in at most `LEAVES` runs, as long as each other to within one. What a run comes to is added sample by
sample, in order, by an observer of its own. Runs are then merged in pairs, pairs in pairs, and so on: a binary tree
over the runs that knows nothing of processes. Each process has runs that follow each other and merges those whose
neighbour it has; who takes the sum merges the rest.

A tree over single samples would hold log2(samples) sums at once, one for each level, where this one holds log2(LEAVES)
and the one that is being added to: four Hessians by their upper halves in fp64 are two in whole fp32 matrices.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compression.calibration.observers import Observer
from compression.workers import ALONE, Workers

LEAVES = 8  # so many processes can share the text


@dataclass(frozen=True)
class Share:
    """Which of so many samples are those of each process."""

    samples: int
    workers: Workers = ALONE

    def runs(self, rank: int | None = None) -> list[tuple[int, range]]:
        """Number and samples of the runs of a process, by default of this one."""
        rank = self.workers.rank if rank is None else rank
        leaves, count = min(LEAVES, self.samples), self.workers.count
        mine = range(rank * leaves // count, (rank + 1) * leaves // count)
        return [(leaf, range(leaf * self.samples // leaves, (leaf + 1) * self.samples // leaves)) for leaf in mine]

    def of(self, rank: int | None = None) -> range:
        """The samples of a process, which follow each other; by default of this one."""
        runs = [samples for _, samples in self.runs(rank)]
        return range(runs[0].start, runs[-1].stop) if runs else range(0)


class Tree:
    """The merged observers of runs, of all those below a node where they are there.

    Position 0 is the first run. Nodes are kept by (level, position): (2, 1) holds the runs 4 to 7.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], Any] = {}

    def put(self, position: int, observer: Any, level: int = 0) -> None:
        """Add a node; two neighbours become the one above them."""
        while (level, position ^ 1) in self._nodes:
            neighbour = self._nodes.pop((level, position ^ 1))
            left, right = (neighbour, observer) if position % 2 else (observer, neighbour)
            left.merge(right)
            level, position, observer = level + 1, position // 2, left
        self._nodes[level, position] = observer

    def given_to(self, owner: int, workers: Workers) -> Any | None:
        """The observer of everything that any process saw, for the owner; None for the others, and if nobody saw any.

        All processes call this together; a tree that was given away is empty.
        """
        nodes, self._nodes = self._nodes, {}
        for part in workers.collect(nodes, owner):
            for (level, position), observer in sorted(part.items()):
                self.put(position, observer, level)
        while len(self._nodes) > 1:  # a node without a neighbour stands for the one above it
            level, position = min(self._nodes)
            self.put(position // 2, self._nodes.pop((level, position)), level + 1)
        return next(iter(self._nodes.values()), None)


class Sums(dict[Any, Tree]):
    """Observers of several things by a key, each over the whole text: `see` shows them activations as they pass.

    Args:
        make: makes an observer for a key.
    """

    def __init__(self, keys: Iterable[Any], make: Callable[[Any], Observer]):
        super().__init__((key, Tree()) for key in keys)
        self.make, self._now = make, dict[Any, Observer]()

    def see(self, key: Any, x: Tensor) -> None:
        if key not in self._now:
            self._now[key] = self.make(key)
        self._now[key].add(x)

    def keep(self, run: int) -> None:
        """What was seen since the last call is a run of samples of that number."""
        for key in list(self._now):
            self[key].put(run, self._now.pop(key))

    def given_to(self, key: Any, owner: int, workers: Workers) -> Observer | None:
        """The observer of a key once the text is through, for the owner; it is gone from here."""
        found = self.pop(key).given_to(owner, workers)
        return self.make(key) if found is None and workers.rank == owner else found
