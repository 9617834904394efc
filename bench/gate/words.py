"""Numbers in words, as the gate, recording and the history say them."""


def shown(then: float, now: float, unit: str) -> str:
    """Two numbers and the relative change.

    >>> shown(2.1, 3.0, "ms"), shown(15728640, 15728641, "B")
    ('2.1 -> 3 ms (+42.9 %)', '15728640 -> 15728641 B (+6.36e-06 %)')
    """
    return f"{arrow(then, now)} {unit} ({percent(relative(then, now))})"


def arrow(then: float, now: float) -> str:
    """Two numbers in as few digits, at least 3, as tell them apart: `2.1 -> 3`."""
    digits = next((each for each in range(3, 17) if f"{then:.{each}g}" != f"{now:.{each}g}"), 3)
    return f"{then:.{digits}g} -> {now:.{digits}g}"


def percent(share: float) -> str:
    """A change in percent, with its sign: `+42.9 %`."""
    return f"{100 * share:+.3g} %"


def relative(then: float, now: float) -> float:
    """The change as a share of what was; infinite from 0."""
    if now == then:
        return 0.0
    return (now - then) / abs(then) if then else float("inf") * (now - then)
