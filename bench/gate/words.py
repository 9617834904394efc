"""Numbers and changes as the messages of the gate, of recording and of the history show them."""


def short(value: float) -> str:
    """Up to four significant digits, for people.

    >>> short(13109504.0), short(0.123456), short(1234.5678), short(128), short(12346)
    ('13.11 M', '0.1235', '1235', '128', '12.35 k')
    """
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")):
        if abs(value) >= 9999.5 and abs(value) >= 0.99995 * factor:
            return f"{float(f'{value:.4g}') / factor:.4g} {letter}".rstrip()
    return f"{value:.4g}"


def shown(then: float, now: float, unit: str) -> str:
    """Two numbers and the relative change.

    >>> shown(2.1, 3.0, "ms"), shown(15728640, 15728641, "B")
    ('2.1 -> 3 ms (+42.9 %)', '15728640 -> 15728641 B (+6.36e-06 %)')
    """
    return f"{arrow(then, now)} {unit} ({percent(relative(then, now))})"


def arrow(then: float, now: float) -> str:
    """Two numbers in as few digits, at least 3, as tell them apart: `2.1 -> 3`."""
    return " -> ".join(apart(then, now))


def apart(then: float, now: float) -> tuple[str, str]:
    """Two numbers in as few digits, at least 3, as tell them apart; whole numbers in full.

    >>> apart(2.1, 3.0), apart(3142512.0, 3491680.0), apart(0.5, 0.5001)
    (('2.1', '3'), ('3142512', '3491680'), ('0.5', '0.5001'))
    """
    if all(float(each).is_integer() and abs(each) < 1e15 for each in (then, now)):
        return str(int(then)), str(int(now))
    digits = next((each for each in range(3, 17) if f"{then:.{each}g}" != f"{now:.{each}g}"), 3)
    return f"{then:.{digits}g}", f"{now:.{digits}g}"


def percent(share: float) -> str:
    """A change in percent, with its sign: `+42.9 %`."""
    return f"{100 * share:+.3g} %"


def relative(then: float, now: float) -> float:
    """The change as a share of what was; infinite from 0."""
    if now == then:
        return 0.0
    return (now - then) / abs(then) if then else float("inf") * (now - then)
