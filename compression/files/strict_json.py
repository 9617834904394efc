"""Strict reading of untrusted JSON and file names, for both packages.

JSON has each name once, finite numbers of at most `DIGITS` digits, and `DEPTH` tables within each other at most, so
that whatever was read can also be copied, compared, printed and written. All that is wrong is a ValueError in words, or
an OSError of the system; which error of the package that becomes, and which way out there is, is up to the caller.
"""

import argparse
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

DEPTH = 100
DIGITS = 100  # of a whole number; above, some numbers are no floats, and some cannot be printed
DESCRIPTION_BYTES = 2**28  # of a file that describes something; the index of a model of 10^12 weights has 2**23

_TABLES = (dict, list)


def strict_json(text: str | bytes) -> Any:
    """The value of a text. Raises ValueError for what is no JSON, and for what the head of the module excludes."""
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value, text)
    return value


def strict_prefix(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at a place of a text, and where it ends. Raises ValueError as `strict_json`."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value, text)
    return value, end


def read_json(path: Path, most: int = DESCRIPTION_BYTES) -> Any:
    """The value of a file. Raises OSError, or ValueError where it is no regular file, too large or not strict JSON."""
    return strict_json(read_bytes(path, most))


def read_bytes(path: Path, most: int = DESCRIPTION_BYTES) -> bytes:
    """What a file holds. Raises OSError, or ValueError where it is no regular file or has more bytes than `most`."""
    size = check_regular(path, most)
    with open(path, "rb") as file:
        return file.read(size)  # as many bytes are set aside


def expanded(given: str | Path, error: Callable[[str], Exception]) -> Path:
    """The path that a user gave, ~ taken for the home directory; whether it exists is not looked at.

    Raises:
        error: no file can have the name, it is not allowed to look there, or there is no home directory.
    """
    try:
        path = Path(given).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except RuntimeError:
        whose = str(given).split("/")[0]
        why = "no home directory is known; set HOME" if whose == "~" else "there is no such user"
        raise error(f"{str(given)!r}: {why}, or give a path without {whose}") from None
    except (OSError, ValueError) as caught:
        why = getattr(caught, "strerror", None) or caught
        raise error(f"{str(given)[:120]!r} cannot be opened: {why}") from None
    return path


def path_option(given: str) -> Path:
    """`expanded` as the type of a command's option."""
    return expanded(given, argparse.ArgumentTypeError)


def exact_fields(table: object, wanted: set[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    """`table`, which must be a dict with exactly these names; raises ValueError naming what is missing or unknown."""
    if not isinstance(table, dict):
        raise ValueError(f"it must be an object of names and values, not {table!r:.200}")
    if missing := sorted(wanted - set(table)):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := sorted(set(table) - wanted - optional):
        raise ValueError(
            f"it has the unknown {', '.join(unknown)[:200]}; known are {', '.join(sorted(wanted | optional))}"
        )
    return table


def finite(value: object) -> float:
    """`value` as a Python float; raises ValueError in words for NaN, infinities, bool, None and what is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"it must be a number, not {value!r:.200} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError("the number does not fit in a float") from None
    if not math.isfinite(number):
        raise ValueError(f"{number!r} is not finite")
    return number


def finite_field(name: str, value: object) -> float:
    """`value` as a Python float; raises ValueError, beginning with the name, for NaN, infinities and no numbers."""
    try:
        return finite(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def at_least(name: str, value: float, least: float, error: Callable[[str], Exception], hint: str = "") -> None:
    """Refuse a number that is too small: "X must be at least 1, not 0", and `hint`.

    Raises:
        error: it is below `least`, or NaN.
    """
    if not value >= least:
        raise error(f"{name} must be at least {least}, not {value}{hint}")


def whole_field(table: Mapping[str, Any], name: str, least: int, most: int) -> int:
    """A whole number of a table; raises ValueError, beginning with the name, for all else and beyond the two bounds."""
    value = table.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, not {value!r:.200}")
    return value


def signature_of(table: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of a table without its `digest`, as JSON in order of names.

    It is of what the table says, not of how it is laid out. Who changes one word and not the digest is found out.
    """
    said = {name: each for name, each in table.items() if name != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def signed(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with its digest, which `check_signature` looks for."""
    return {**table, "digest": signature_of(table)}


def check_signature(table: Mapping[str, Any]) -> None:
    """Raise ValueError unless a table says what it said when it was signed."""
    was, now = table.get("digest"), signature_of(table)
    if was != now:
        raise ValueError(f"it was changed after it was written: its digest is {was!r:.40}, but its content has {now!r}")


def flag_field(table: Mapping[str, Any], name: str) -> bool:
    """True or false of a table; raises ValueError, beginning with the name, for all else."""
    value = table.get(name)
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, not {value!r:.200}")
    return value


def check_regular(path: Path, most: int = DESCRIPTION_BYTES) -> int:
    """The bytes of a file. Raises OSError, or ValueError where it is no regular file or has more bytes than `most`."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if facts.st_size > most:
        raise ValueError(f"{path} has {facts.st_size} bytes, and at most {most} are read")
    return facts.st_size


# ----------------------------------------------------------------------------------------------------------------------

_TOO_DEEP = f"it is nested too deeply: more than {DEPTH} tables within each other"


def _check_depth(value: Any, text: str) -> None:
    if text.count("[") + text.count("{") <= DEPTH:
        return
    level = [value] if isinstance(value, _TABLES) else []
    for _ in range(DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [each for one in inner for each in one if isinstance(each, _TABLES)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.200} is there twice")
    return table


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a finite number")


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits:.40} is not finite: it does not fit in a float")
    return number


def _int(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"{digits[:20]}... has {len(digits)} digits, and at most {DIGITS} are read")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_float, parse_int=_int)
