"""The API key of an endpoint, kept out of tracebacks, logs and files, and removed from server messages.

A traceback may be printed with the local variables of its frames (`pytest -l`), each as its `repr`. So the key is never
a string in a variable of a frame that an exception leaves: `Key` shows nothing of itself, and what makes a header of it
(`endpoint._exchange`) returns failures as values.
"""

import base64
import os
import re
from typing import Any, NoReturn

from bench.errors import OptionError
from bench.machine.environment import KEY

HIDDEN = "[key]"
PIECE = 8  # so many characters of the key, one after the other, are not shown either


class Key:
    """A secret. Its text, `repr` and format are `[key]`; it cannot be pickled or copied into a file.

    Raises:
        OptionError: it has characters that no key has; the message does not hold it, nor does the frame.
    """

    __slots__ = ("_pieces", "_secret")

    def __init__(self, secret: str):
        sound = bool(secret) and secret.isascii() and secret.isprintable() and not set(secret) & set(" \"'\\")
        if not sound:
            del secret
            raise OptionError(f"the key in {KEY} must not contain spaces, quotes or line breaks")
        self._secret = secret
        self._pieces = re.compile(f"(?=({'|'.join(map(re.escape, sorted(_pieces(secret))))}))")

    @classmethod
    def from_environment(cls) -> "Key | None":
        """None where there is none, as local servers need none."""
        return cls(os.environ[KEY]) if os.environ.get(KEY) else None

    def __repr__(self) -> str:
        return HIDDEN

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key cannot be pickled")

    def header(self) -> str:
        """The value of the header Authorization. For the frame that sends it, from which no exception may come."""
        return f"Bearer {self._secret}"

    def hidden(self, text: str) -> str:
        """A text with `[key]` for the key, for pieces of it, and for its base64 and theirs."""
        parts, end = [], 0
        for match in self._pieces.finditer(text):
            begin = match.start()
            if begin > end or not parts:
                parts.append(text[end:begin] + HIDDEN)
            end = max(end, begin + len(match[1]))
        return "".join(parts) + text[end:] if parts else text

    def hidden_within(self, value: Any) -> Any:
        """A value of JSON with every text in it as `hidden` makes it."""
        if isinstance(value, str):
            return self.hidden(value)
        if isinstance(value, list):
            return [self.hidden_within(each) for each in value]
        if isinstance(value, dict):
            return {self.hidden(name): self.hidden_within(each) for name, each in value.items()}
        return value


def _pieces(secret: str) -> set[str]:
    """All runs of `PIECE` characters of the key and of its base64 at every place in a group of three bytes."""
    forms = {secret}
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + secret.encode() + b"\0" * (-(before + len(secret)) % 3)).decode()
        inner = encoded[(0, 2, 3)[before] : len(encoded) - (0, 2, 3)[-(before + len(secret)) % 3]]
        forms |= {inner, inner.replace("+", "-").replace("/", "_")} if len(inner) >= PIECE else set()
    return {form[at : at + PIECE] for form in forms for at in range(max(1, len(form) - PIECE + 1))}
