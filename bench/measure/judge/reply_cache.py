"""Replies of a judge, cached on disk: no request is repeated by this run or a later one.

A file of JSON lines, only ever appended to: `{"key": ..., "reply": ...}`, where the key is the SHA-256 of everything
that was sent. A line is on the disk, whole, when `put` returns. Several processes may write one file: a lock is held
for each line, and of two replies to one question all keep the one that came first.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from bench.errors import JudgeError
from compression.files.strict_json import strict_json

Reply = Mapping[str, Any]


def key_of(sent: Mapping[str, Any]) -> str:
    """The name of a question: equal exactly where all that is sent is.

    >>> key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}), key_of({"a": 1}) == key_of({"a": "1"})
    (True, False)
    """
    text = json.dumps(sent, ensure_ascii=True, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """The replies in a file, which is made if it is not there. May be used by several threads.

    Raises:
        JudgeError: the file cannot be opened, or a line of it is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._found: dict[str, Reply] = {}
        self._read = 0  # bytes of whole lines that are in `_found`
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                self._catch_up(file)
        except OSError as error:
            raise JudgeError(f"cannot write replies to {self.path}: {error.strerror or error}") from None

    def get(self, key: str) -> Reply | None:
        """The reply to a question, of this process or another; None if there is none yet."""
        with self._lock:
            if key not in self._found and os.stat(self.path).st_size > self._read:
                with open(self.path, "rb") as file:
                    self._catch_up(file)
            return self._found.get(key)

    def put(self, key: str, reply: Reply) -> Reply:
        """Keep a reply unless there is one by now; the one that is kept.

        A last line that a killed writer left unfinished is taken away first.
        """
        line = (json.dumps({"key": key, "reply": reply}, allow_nan=False) + "\n").encode()
        try:
            with self._lock, open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed: nobody else writes now
                self._catch_up(file)
                if key not in self._found:
                    file.truncate(self._read)
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                    self._catch_up(file)
                return self._found[key]
        except OSError as error:
            raise JudgeError(f"cannot write a reply to {self.path}: {error.strerror or error}") from None

    def __len__(self) -> int:
        return len(self._found)

    def _catch_up(self, file: BinaryIO) -> None:
        """Read the whole lines that are there and not yet known."""
        file.seek(self._read)
        for line in file.read().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return  # being written, or left by a killed writer
            try:
                record = strict_json(line)
                key, reply = record["key"], record["reply"]
                if not isinstance(key, str) or not isinstance(reply, dict):
                    raise ValueError("a line must have a string as key and an object as reply")
                self._found.setdefault(key, reply)
            except (ValueError, KeyError, TypeError):
                raise JudgeError(
                    f"{self.path}: the line at byte {self._read} is damaged; delete that line or the file, to "
                    "query the judge again"
                ) from None
            self._read += len(line)
