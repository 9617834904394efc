"""A clock that also tells how long this thread was runnable but not running: what a shared machine adds.

Linux counts it for every thread (`run_delay` of /proc/<pid>/task/<tid>/schedstat, in nanoseconds), whoever the other
is, and also where a quota of processor time is used up. A thread that sleeps, or waits for another, wants no processor:
that stays part of its time, as does what a hypervisor takes.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

_COUNTED = "/proc/thread-self/schedstat"


class Moment(NamedTuple):
    """Seconds on the clock, and those of them that the thread has waited so far; None where no system counts them."""

    clock_s: float
    waited_s: float | None


@contextmanager
def moments() -> Iterator[Callable[[], Moment]]:
    """A function that tells the moment, to the thread that entered. It takes a few microseconds."""
    file = _opened()

    def waited() -> int:
        return int(os.pread(file, 80, 0).split()[1])

    def moment() -> Moment:
        nonlocal last
        while True:
            now, count = time.perf_counter(), waited()
            if count == last:  # else there was a wait, perhaps between the two readings, which is where it often is
                return Moment(now, 1e-9 * count)
            last = count

    if file is None:
        yield lambda: Moment(time.perf_counter(), None)
        return
    last = waited()
    try:
        yield moment
    finally:
        os.close(file)


def _opened() -> int | None:
    """The kernel's counts of this thread; None where there are none, or nothing is counted."""
    try:
        file = os.open(_COUNTED, os.O_RDONLY)
    except OSError:
        return None
    if set(os.pread(file, 80, 0).split()) - {b"0"}:
        return file
    os.close(file)
    return None
