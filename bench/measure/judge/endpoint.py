"""Client of the chat-completions protocol of OpenAI: one request, with retries.

What passes is waited for: no connection, a connection that ends early, a reply that is half there or no JSON, status
408, 409, 425, 429 and 5xx. Waits double from `Patience.first` and are shortened by chance, by up to a half, so that
several clients do not come back together; where the server says how long to wait (Retry-After, RFC 9110 section
10.2.3), all requests wait that long. Other refusals are errors at once. Redirections are not followed, which would show
the key to another server.

The key is read from the environment and held in memory (`key`). It is in no message, no traceback, no file and no key
of the cache, and it is taken out of whatever the server says (`exchange`).
"""

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from bench.errors import JudgeError, OptionError
from bench.machine.environment import KEY
from bench.measure.judge.exchange import Failure, exchange
from bench.measure.judge.key import Key
from compression.files.strict_json import at_least

PASSING = frozenset({408, 409, 425, 429, *range(500, 600)})
Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a server is waited for, in seconds. Raises OptionError for what cannot be.

    Attributes:
        timeout: for one attempt, from the first byte sent to the last received.
        attempts: of one request, in all.
        first: wait before the second attempt; doubled before each further one.
        longest: wait between two attempts; a server that asks for more is not waited for.
    """

    timeout: float = 60.0
    attempts: int = 6
    first: float = 1.0
    longest: float = 120.0

    def __post_init__(self) -> None:
        for name, value, least in (("timeout", self.timeout, 0.001), ("attempts", self.attempts, 1)):
            at_least(f"--judge-{name}", value, least, OptionError)
            if value == float("inf"):
                raise OptionError(f"--judge-{name} must be finite, not {value}")


class Refused(JudgeError):
    """The server answered that it will not do this. `status` is its HTTP status."""

    def __init__(self, words: str, status: int):
        super().__init__(words)
        self.status = status


class Unreadable(JudgeError):
    """The server answered, time and again, with what is no reply of this protocol. The message says what."""


class Url(str):
    """The address of an endpoint, without a slash at its end.

    Raises:
        OptionError: no http or https, no host, a port that cannot be; or a name, a password or a query, which may hold
            a key: the command and the URL are written to files. Neither the message nor the frame holds them.
    """

    def __new__(cls, text: str) -> "Url":
        wrong = _wrong_with(text)
        if wrong is not None:
            del text
            raise OptionError(wrong)
        return super().__new__(cls, text.rstrip("/"))


class Endpoint:
    """A server at `url`, such as https://host/v1. May be used by several threads.

    Args:
        key: sent as a bearer token; None sends none.
    """

    def __init__(self, url: Url, *, key: Key | None = None, patience: Patience | None = None):
        self.url = url
        self.patience = patience or Patience()
        self._key = key
        self._calm = 0.0  # nothing is sent before this time, by the monotonic clock
        self._stopped = threading.Event()

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    @property
    def stopped(self) -> threading.Event:
        """Once set, waits end and nothing more is sent."""
        return self._stopped

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Read]) -> Read:
        """Send a body, and return what `read` makes of the JSON that comes back, from which the key is taken out.

        `read` raises ValueError for JSON of another form, which is asked for again as half a reply is.

        Raises:
            Refused: the server will not do it.
            Unreadable: it answered in the last attempt, and what it said is no JSON, or not of the form.
            JudgeError: no whole reply in all attempts.
        """
        data = json.dumps(body).encode()
        why, answered = "", False
        for attempt in range(self.patience.attempts):
            self._wait(attempt)
            reply = exchange(f"{self.url}{path}", data, self._key, self.patience.timeout)
            answered = False
            if isinstance(reply, Failure):
                if reply.final:
                    raise JudgeError(f"the judge at {self.url} cannot be trusted: {reply.words}")
                why = reply.words
            elif reply.status in PASSING:
                why = f"status {reply.status}: {reply.excerpt}"
                self._wait_as_told(reply.retry_after, why)
            elif reply.status != 200:
                raise Refused(f"the judge at {self.url} refuses: status {reply.status}: {reply.excerpt}"
                              f"{_hint(reply.status)}", reply.status)  # fmt: skip
            else:
                answered = True
                try:
                    if reply.wrong:
                        raise ValueError(reply.wrong)
                    return read(reply.content)
                except ValueError as error:
                    why = f"unreadable reply ({error}): {reply.excerpt}"
        kind = Unreadable if answered else JudgeError
        raise kind(
            f"the judge at {self.url} did not answer in {self.patience.attempts} attempts; the last: {why}. What it "
            "has answered is kept: run the same command again, with --resume"
        )

    def _wait(self, attempt: int) -> None:
        """Until the server may be asked again. Raises JudgeError where the run stops meanwhile."""
        wait = 0.0
        if attempt:
            wait = min(self.patience.longest, self.patience.first * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
        wait = max(wait, self._calm - time.monotonic())
        if self._stopped.wait(max(wait, 0.0)) if wait > 0 else self._stopped.is_set():
            raise JudgeError(f"the judge at {self.url} gets no more requests: the run stops")

    def _wait_as_told(self, seconds: float | None, why: str) -> None:
        if seconds is None:
            return
        if seconds > self.patience.longest:
            raise JudgeError(
                f"the judge at {self.url} asks to wait {seconds:.0f} s ({why}), more than the "
                f"{self.patience.longest:g} s that are waited; what it has answered is kept: run the same "
                "command later, with --resume"
            )
        self._calm = max(self._calm, time.monotonic() + seconds)


def _wrong_with(url: str) -> str | None:
    """Why a URL is none of an endpoint, without a part of it that may be a secret; None where it is one."""
    example = "give a URL such as https://host/v1"
    try:
        parts = urlsplit(url)
        secret = "@" in parts.netloc or parts.query or parts.fragment
        port = parts.port
    except ValueError:
        return f"--judge-url is not a valid URL; {example}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"--judge-url is not the address of an endpoint; {example}"
    if secret:
        return (
            "--judge-url must not contain a user name, a password or a query, because it is written to files; put the "
            f"key into {KEY} and give only {parts.scheme}://{parts.hostname}..."
        )
    if port == 0 or not url.isascii() or not url.isprintable() or " " in url:
        return f"--judge-url has an invalid port or characters; {example}"
    return None


def _hint(status: int) -> str:
    if status in (401, 403):
        return f"; the key is read from the environment variable {KEY}"
    if status in (301, 302, 307, 308, 404, 405):
        return "; check the name of the model, and that the URL ends before /chat/completions, as in https://host/v1"
    return ""
