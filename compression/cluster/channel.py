"""The other side of `compression.cluster.node`: a process that a node's worker started, and that ends with it."""

import json
import os
import signal
import socket
import threading
from queue import SimpleQueue
from typing import Any

from compression.cluster.node import CHANNEL


class Channel:
    """Lines that the worker asks for, and answers to it. A worker that dies while something is done ends this process,

    so that whoever does the same again is alone with it.
    """

    def __init__(self) -> None:
        with socket.socket(fileno=int(os.environ.pop(CHANNEL))) as channel:
            self._lines, self._answers = channel.makefile(encoding="utf-8"), channel.makefile("w", encoding="utf-8")
        self._asked: SimpleQueue[str | None] = SimpleQueue()
        self._busy = True
        threading.Thread(target=self._read, name="channel", daemon=True).start()

    def _read(self) -> None:
        for line in self._lines:
            self._asked.put(line.rstrip("\n"))
        if self._busy:
            os.kill(os.getpid(), signal.SIGKILL)
        self._asked.put(None)

    def next(self) -> str | None:
        """What is asked next; None once the worker has ended."""
        self._busy = False
        asked = self._asked.get()
        self._busy = True
        return asked

    def answer(self, **answer: Any) -> None:
        """Tell the worker. What cannot be told any more is left: the worker is gone, and this process goes too."""
        try:
            self._answers.write(json.dumps(answer, default=str) + "\n")
            self._answers.flush()
        except OSError:
            self._busy = False


def bound() -> Channel | None:
    """The channel of this process, None where no node started it. From now on it ends with its worker."""
    return Channel() if CHANNEL in os.environ else None
