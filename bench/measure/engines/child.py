"""A process that answers lines of JSON: started, asked and ended, with its own words in every error."""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.errors import EngineError

TAIL_LINES = 5  # of the log, in the error about a process that ended
TAIL_CHARACTERS = 1000
LOOK_S = 1.0  # between two looks whether the process still lives
READ_BYTES = 2**20


class Child:
    """A process in a group of its own, whose standard error goes to a log.

    Args:
        what: names the process in errors.
        command, environment: of the process.
        log: a file, begun anew.
        patience_s: seconds that an answer may take.

    Raises:
        EngineError: the log cannot be written, or the command cannot be started.
    """

    def __init__(
        self, what: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path, patience_s: float
    ):
        self.what, self.log, self.patience_s = what, log, patience_s
        try:
            with open(log, "wb") as file:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=dict(environment),
                    start_new_session=True, bufsize=0,
                )  # fmt: skip
        except OSError as error:
            raise EngineError(
                f"{what} must be started by {command[0]}, with its log in {log}, but: {error}. Name a Python and a log "
                "file in a folder that exists"
            ) from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._input, False)
        self._unread = self._line = b""
        self._end: str | None = None  # why nothing can be asked any more

    @property
    def pid(self) -> int:
        """Of the process, and the number of its group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._end is None and self._process.poll() is None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            EngineError: the process answers with an error, after which it can be asked again; or it has ended, does not
                answer in time, or answers something else than a table in JSON, after which it is ended.
        """
        if self._end is not None:
            raise EngineError(f"{self.what} cannot be asked any more: {self._end}. Start it again")
        try:
            answer = json.loads(self._exchange(json.dumps(request).encode() + b"\n"))
            if not isinstance(answer, dict):
                raise ValueError
        except EngineError as error:
            self._end = str(error)
            self.close()
            raise
        except BaseException as error:  # also an interrupt: an answer that comes later would be taken for the next one
            self._end = f"its last request was broken off by {type(error).__name__}"
            self.close()
            if isinstance(error, ValueError):
                raise EngineError(
                    f"{self.what} must answer with a table in JSON, but wrote {self._line[:200]!r}. {self._words()}"
                ) from None
            raise
        if "error" in answer:
            words = f"{answer.get('kind', 'error')}: {answer['error']}"
            raise EngineError(f"{self.what} could not do what it was asked: {words} (its log is in {self.log})")
        return answer

    def _exchange(self, request: bytes) -> bytes:
        """Write all of the request, and read a line; whichever of them stalls, within the patience."""
        end = time.monotonic() + self.patience_s
        with selectors.DefaultSelector() as ready:
            ready.register(self._input, selectors.EVENT_WRITE)
            ready.register(self._output, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if (left := end - time.monotonic()) <= 0:
                    raise EngineError(
                        f"{self.what} must answer within {self.patience_s:g} s, but did not, and was ended. Ask for "
                        f"less at once, or allow more time. {self._words()}"
                    )
                events = ready.select(min(left, LOOK_S))
                if not events and self._process.poll() is not None:
                    raise self._ended()  # something that it started holds its output open
                for key, _ in events:
                    if key.fd == self._output:
                        if not (read := os.read(self._output, READ_BYTES)):
                            raise self._ended()
                        self._unread += read
                        continue
                    with suppress(BrokenPipeError):  # the output then ends, and tells why
                        request = request[os.write(self._input, request) :]
                        if request:
                            continue
                    ready.unregister(self._input)
        self._line, _, self._unread = self._unread.partition(b"\n")
        return self._line

    def _ended(self) -> EngineError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LOOK_S)
        code = self._process.returncode
        if code is None:
            how = "closed its output"
        elif code >= 0:
            how = f"ended with exit status {code}"
        else:
            why = ", most likely because memory ran out" if code == -signal.SIGKILL else ""
            how = f"was killed by {signal.Signals(-code).name}{why}"
        return EngineError(f"{self.what} must answer, but {how}. {self._words()}")

    def _words(self) -> str:
        """The last lines of the log, and where it is."""
        try:
            text = self.log.read_bytes()[-(2**16) :].decode(errors="replace")
        except OSError as error:
            return f"Its log {self.log} cannot be read: {error.strerror}"
        lines = [line.strip() for line in text.splitlines() if line.strip()][-TAIL_LINES:]
        return f"Its log {self.log} ends with: {' | '.join(lines)[-TAIL_CHARACTERS:] or 'nothing'}"

    def close(self) -> None:
        """End the process and whatever it started, whatever it is doing."""
        self._end = self._end or "it was closed"
        with suppress(ProcessLookupError, PermissionError):  # macOS: of a group that has only a zombie left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
