"""One HTTP request and its result as a value: the only stack frames that hold the key as text.

No exception leaves them. Those of `http.client` and of sockets come with frames whose variables are the headers that
were sent, and a server may say them again in a status line or the size of a chunk; so what failed is returned in words,
without the key, and raised by the caller. A reply is read up to `LARGEST` bytes in all, headers, sizes of chunks and
trailers included, and within one time.
"""

import http.client
import io
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from bench.measure.judge.asking import short
from bench.measure.judge.key import Key

LARGEST = 2**24  # bytes of a reply
_BESIDE = 2**18  # and of what is around it: headers, sizes of chunks, trailers


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered, without the key.

    Attributes:
        content: of its JSON; None where that cannot be read, with the reason in `wrong`.
        excerpt: the beginning of its text, quoted.
        retry_after: seconds to wait, where it says so.
    """

    status: int
    content: Any
    wrong: str | None
    excerpt: str
    retry_after: float | None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no reply; `final` where asking again is of no use."""

    words: str
    final: bool = False


def exchange(url: str, body: bytes, key: Key | None, timeout: float) -> Reply | Failure:
    """POST a body of JSON: one attempt of at most `timeout` seconds from the connection on."""
    stopped: BaseException
    try:
        return _exchange(url, body, key, timeout)
    except ssl.SSLCertVerificationError as error:
        return Failure(words=f"the certificate does not hold: {error.verify_message}", final=True)
    except Exception as error:  # whatever it is: its frames hold the key
        words = f"{type(error).__name__}: {error}".removesuffix(": ")
        return Failure(words=key.hidden(words) if key else words)
    except BaseException as error:  # the run is interrupted, which goes on without these frames
        stopped = error.with_traceback(None)
        stopped.__context__ = stopped.__cause__ = None
    raise stopped


def _exchange(url: str, body: bytes, key: Key | None, timeout: float) -> Reply:
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
    if key:
        headers["Authorization"] = key.header()
    with _connected(parts, timeout) as (connection, late):
        try:
            connection.request("POST", parts.path, body=body, headers=headers)
            response = connection.getresponse()
            data = response.read(LARGEST + 1)
            if len(data) > LARGEST:
                raise http.client.HTTPException(f"a reply of more than {LARGEST} bytes")
            if response.length:
                raise http.client.IncompleteRead(data, response.length)
        except Exception:
            if late.is_set():
                raise TimeoutError(f"no whole reply in {timeout:g} s") from None
            raise
        if late.is_set():
            raise TimeoutError(f"no whole reply in {timeout:g} s")
    hide: Callable[[Any], Any] = key.hidden_within if key else lambda value: value
    text = data.decode(errors="replace")
    content, wrong = None, None
    try:
        content = hide(json.loads(text))
        said = json.dumps(content, ensure_ascii=False)
    except RecursionError:
        wrong, said = "it is nested too deeply", hide(text)
    except ValueError as error:
        wrong, said = str(error), hide(text)
    wait = retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
    return Reply(status=response.status, content=content, wrong=wrong, excerpt=short(said, 300), retry_after=wait)


@contextmanager
def _connected(parts: SplitResult, timeout: float) -> Iterator[tuple[http.client.HTTPConnection, threading.Event]]:
    """A connection that is cut off after `timeout` seconds, and whether it was.

    A server that sends a byte now and then, be it of a handshake, never lets a socket time out by itself.
    """
    assert parts.hostname is not None
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    connection.response_class = _Response
    late = threading.Event()
    held = socket.create_connection((parts.hostname, connection.port), timeout)
    try:
        if secure:
            context = ssl.create_default_context()
            held = context.wrap_socket(held, server_hostname=parts.hostname, do_handshake_on_connect=False)

        def cut() -> None:
            late.set()
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            if isinstance(held, ssl.SSLSocket):
                held.do_handshake()
            connection.sock = held
            yield connection, late
        finally:
            timer.cancel()
    finally:
        connection.close()
        held.close()


class _Response(http.client.HTTPResponse):
    """A response of so many bytes at most, whatever part of it is endless."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.fp = io.BufferedReader(_Limited(self.fp, LARGEST + _BESIDE))


class _Limited(io.RawIOBase):
    def __init__(self, file: Any, most: int):
        self._file, self._left = file, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise http.client.HTTPException(f"a reply of more than {LARGEST} bytes")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def retry_after(told: str | None, now: datetime) -> float | None:
    """Seconds to wait by the header Retry-After, a number or a date; None where it says nothing that can be read.

    >>> now = datetime(2026, 11, 22, 23, 0, 0, tzinfo=UTC)
    >>> [retry_after(told, now) for told in ("7", "Sun, 22 Nov 2026 23:00:30 GMT", "soon", None)]
    [7.0, 30.0, None, None]
    """
    if told is None:
        return None
    if told.strip().isdecimal():
        return float(told)
    try:
        return max(0.0, (parsedate_to_datetime(told) - now).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
