"""Safe printing of untrusted text (names, recipes, errors of libraries) on terminals and in CI logs.

A terminal obeys control characters, and GitHub's runner obeys lines of a log that begin with `::` or hold `##[`. Here
they are shown instead: `\\x1b`, `\\x3a:error`.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

CLOSED_PIPE = 141  # the exit status that a shell gives for SIGPIPE

_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
HIDDEN = re.compile(  # controls, marks that turn the direction of writing, halves of surrogate pairs
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_COMMAND = re.compile(r"^(\s*):(?=:)|#(?=#\[)", re.MULTILINE)


def printable(text: object) -> str:
    """Text in one line: a line break becomes a space, any other character that does not print its escape.

    >>> printable("one\\ntwo"), printable("\\x1b[31mred")
    ('one two', '\\\\x1b[31mred')
    """
    return _shown(_BREAKS.sub(" ", str(text)))


def terminal(text: object) -> str:
    """One line for a terminal or a log: printable, and no command to the runner of a workflow.

    >>> terminal("::error::passed"), terminal("see ##[error]passed")
    ('\\\\x3a:error::passed', 'see \\\\x23#[error]passed')
    """
    return _disarmed(printable(text))


class Lines:
    """A text stream whose lines are those of `terminal`, but for the line breaks, which are the writer's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._begins = True  # whether the next character begins a line

    def write(self, text: str) -> int:
        """Write all of it; the number of characters of `text`."""
        shown = "\n".join(map(_shown, text.split("\n")))
        self._stream.write(_disarmed(shown) if self._begins else _disarmed("-" + shown)[1:])
        self._begins = text.endswith("\n") if text else self._begins
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End the program without a traceback when the reader of its output ends first, as `| head` does.

    Raises:
        SystemExit: with `CLOSED_PIPE`.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        raise SystemExit(CLOSED_PIPE) from None


def _shown(text: str) -> str:
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def _disarmed(text: str) -> str:
    return _COMMAND.sub(lambda found: f"{found[1] or ''}\\x{ord(found[0][-1]):02x}", text)
