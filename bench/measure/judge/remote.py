"""A judge behind an OpenAI-compatible endpoint; every reply is cached before the next step uses it."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from bench.errors import JudgeError, OptionError
from bench.measure.judge.asking import Verdict, chosen, counted, short, weighed
from bench.measure.judge.endpoint import Endpoint, Refused, Unreadable
from bench.measure.judge.reply_cache import Cache, key_of
from compression.files.strict_json import at_least

PATH = "/chat/completions"
TOPS = 20  # log-probabilities asked for at each token: the most that the protocol allows
SAMPLES = 20  # Liu et al. 2023, section 3, for a model without log-probabilities
STEPS_TOKENS = 512  # of a text
CHOICE_TOKENS = 8  # of a choice, which may have a label or marks around it
MAX = sys.float_info.max


class RemoteJudge:
    """Asks `model` of an endpoint.

    A choice is read from the log-probabilities of the `TOPS` likeliest tokens where the endpoint gives them, which the
    first choice finds out; else from `samples` samples at temperature 1, each its own request.

    Args:
        concurrency: requests under way at once.
    """

    def __init__(self, endpoint: Endpoint, model: str, cache: Cache, *, samples: int = SAMPLES, concurrency: int = 4):
        for name, value in (("samples", samples), ("concurrency", concurrency)):
            at_least(f"--judge-{name}", value, 1, OptionError)
        self.endpoint, self.model, self.cache = endpoint, model, cache
        self.samples, self.concurrency = samples, concurrency
        self.asked = 0  # requests that were answered by the endpoint and not by the cache
        self._logprobs: bool | None = None
        self._unreadable: dict[str, dict[str, Any]] = {}

    @property
    def name(self) -> str:
        return self.model

    @property
    def how(self) -> str:
        """Where probabilities come from; known after the first choice."""
        return "logprobs" if self._logprobs else f"samples{self.samples}"

    def write(self, prompt: str) -> str:
        """The likeliest text. Raises JudgeError where it is empty, or the endpoint cannot be asked."""
        [reply] = self._replies([self._body(prompt, temperature=0, max_tokens=STEPS_TOKENS)])
        text = (reply["text"] or "").strip()
        if not text:
            raise JudgeError(f"the judge {self.model} returned no evaluation steps ({reply['end']})")
        return text

    def choose(self, prompts: Sequence[str], options: Sequence[str]) -> list[Verdict]:
        """See `asking.Judge`."""
        if not prompts:
            return []
        if self.gives_logprobs(prompts[0]):
            replies = self._replies([self._with_logprobs(prompt) for prompt in prompts])
            return [by_logprobs(reply, options) for reply in replies]
        replies = self._replies([
            self._body(prompt, temperature=1, max_tokens=CHOICE_TOKENS, seed=seed)
            for prompt in prompts for seed in range(self.samples)
        ])  # fmt: skip
        return [
            by_samples(replies[start : start + self.samples], options) for start in range(0, len(replies), self.samples)
        ]

    def gives_logprobs(self, prompt: str) -> bool:
        """Whether log-probabilities of several tokens come with a reply; found out by the first prompt, once."""
        if self._logprobs is None:
            [reply] = self._replies([self._with_logprobs(prompt)])
            self._logprobs = any(len(at) > 1 for at in reply["tops"])
        return self._logprobs

    def _body(self, prompt: str, **settings: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": [{"role": "user", "content": prompt}], **settings}

    def _with_logprobs(self, prompt: str) -> dict[str, Any]:
        return self._body(prompt, temperature=0, max_tokens=CHOICE_TOKENS, logprobs=True, top_logprobs=TOPS)

    def _replies(self, bodies: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The replies in order; equal bodies, and those that were answered before, are not sent again."""
        keys = [key_of({"url": self.endpoint.url + PATH, "body": body}) for body in bodies]
        wanted = {key: body for key, body in zip(keys, bodies, strict=True)
                  if key not in self._unreadable and self.cache.get(key) is None}  # fmt: skip
        _together(self._ask, list(wanted.items()), self.concurrency, self.endpoint)
        return [self._kept(key) for key in keys]

    def _kept(self, key: str) -> Mapping[str, Any]:
        """A reply of the cache. Raises JudgeError where it is none that was kept by `_ask`."""
        reply = self._unreadable.get(key) or self.cache.get(key)
        try:
            return read_kept(reply)
        except ValueError as error:
            raise JudgeError(
                f"{self.cache.path}: the reply with the key {key} is damaged ({error}); delete its line to request "
                "it again"
            ) from None

    def _ask(self, item: tuple[str, Mapping[str, Any]]) -> None:
        key, body = item
        try:
            reply = self.endpoint.post(PATH, body, read_completion)
        except Refused as error:
            if "logprobs" not in body or error.status not in (400, 422) or "logprob" not in str(error).lower():
                raise
            reply = no_reply("log-probabilities are refused")
        except Unreadable as error:
            if body["max_tokens"] != CHOICE_TOKENS:
                raise
            self._unreadable[key] = no_reply(str(error))  # not on disk: another run asks anew
            return
        self.asked += 1
        self.cache.put(key, reply)


def no_reply(why: str) -> dict[str, Any]:
    """What is kept where no text came."""
    return {"text": None, "end": why, "tops": []}


def read_completion(found: Any) -> dict[str, Any]:
    """What is kept of a completion: its text, why it ended, and for each token the likeliest ones with their
    log-probabilities; None for what is no finite number.

    Raises ValueError for JSON of another form.
    """
    try:
        choice = found["choices"][0]
        logprobs = choice.get("logprobs") or {}
        tops = [
            {top["token"]: _finite(top["logprob"]) for top in (*(at.get("top_logprobs") or []), at)}
            for at in logprobs.get("content") or []
        ]
        text, end = choice["message"].get("content"), short(str(choice.get("finish_reason")))
        return read_kept({"text": text, "end": end, "tops": tops})
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a completion: {type(error).__name__} {short(str(error))}") from None


def read_kept(reply: Any) -> Mapping[str, Any]:
    """A reply, checked: a text or None, why it ended, and numbers or None by token. Raises ValueError for another."""
    if not isinstance(reply, Mapping) or not {"text", "end", "tops"} <= set(reply):
        raise ValueError("it lacks text, end or tops")
    if not isinstance(reply["text"], str | None) or not isinstance(reply["end"], str):
        raise ValueError("its text and its end must be strings")
    tables = reply["tops"]
    if not isinstance(tables, list) or not all(isinstance(at, dict) for at in tables):
        raise ValueError("its tops must be a list of objects")
    for token, value in (pair for at in tables for pair in at.items()):
        if not isinstance(token, str) or (value is not None and _finite(value) is None):
            raise ValueError("its tops are not log-probabilities of tokens")
    return reply


def _finite(value: Any) -> float | None:
    """A number as a float; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX <= value <= MAX:
        return None
    return float(value)


def by_logprobs(reply: Mapping[str, Any], options: Sequence[str]) -> Verdict:
    """A choice from the log-probabilities at the first token of the reply that is an option."""
    text = reply["text"]
    if text is None:
        return Verdict(invalid=(f"no text came ({reply['end']})",))
    if chosen(text, options) is None:
        return Verdict(invalid=(f"none of {', '.join(options)}: {short(text)}",))
    names = {option.casefold() for option in options}
    for tops in reply["tops"]:
        values = {token: -math.inf if value is None else value for token, value in tops.items()}
        likeliest = max(values, key=values.__getitem__, default="")
        if likeliest.strip().casefold() in names or None in tops.values():
            return weighed(tops, options)
    return Verdict(invalid=(f"no token by itself is one of {', '.join(options)} in {short(text)}",))


def by_samples(replies: Sequence[Mapping[str, Any]], options: Sequence[str]) -> Verdict:
    """A choice from the samples that could be read."""
    read = [(chosen(reply["text"] or "", options), reply) for reply in replies]
    invalid = tuple(
        f"none of {', '.join(options)}: {short(reply['text'] or '')}" for found, reply in read if found is None
    )
    valid = [found for found, _ in read if found is not None]
    return Verdict(counted(valid) if valid else {}, invalid)


def _together(ask: Callable[[Any], None], items: Sequence[Any], concurrency: int, endpoint: Endpoint) -> None:
    """Ask for all items, several at once. The first error ends it: waits are cut short, nothing more is sent."""
    endpoint.stopped.clear()
    pool = ThreadPoolExecutor(max_workers=max(1, min(concurrency, len(items))))
    try:
        for future in as_completed([pool.submit(ask, item) for item in items]):
            future.result()
    except BaseException:
        endpoint.stopped.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
