"""Questions to a judge and how its replies are read: a choice among few options, with probabilities.

A reply that is none of the options is no judgement. It is kept, counted and shown, and enters no mean.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

ROUNDING = 1e-3  # nat by which a log-probability may exceed 0
MOST = 1.1  # probability of all candidates together, at most


@dataclass(frozen=True)
class Verdict:
    """What a judge chose.

    Attributes:
        weights: probability of each option that has some, together 1; empty where there is no judgement.
        invalid: for every reply that could not be read, why.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    invalid: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return bool(self.weights)


class Judge(Protocol):
    """A model that judges. Both methods raise JudgeError where it cannot be asked at all."""

    name: str  # part of the key of every row, as is where its probabilities come from:
    how: str  # "logprobs", or "samples20"

    def write(self, prompt: str) -> str:
        """A text, the likeliest."""

    def choose(self, prompts: Sequence[str], options: Sequence[str]) -> list[Verdict]:
        """For each prompt, which of the options (single words or numbers) comes next, in the order of the prompts."""


def weighed(candidates: Mapping[str, float | None], options: Sequence[str]) -> Verdict:
    """A verdict from log-probabilities of candidate tokens (nat); none where they cannot be log-probabilities, or none
    of them is an option.

    A log-probability is a finite number of at most 0; together candidates have a probability of 1, but for rounding.
    """
    wrong = {token: value for token, value in candidates.items() if not _is_logprob(value)}
    if wrong:
        token, value = next(iter(wrong.items()))
        return Verdict(invalid=(f"the log-probability of {short(token, 20)} is {value}, which none can be",))
    sound = {token: value for token, value in candidates.items() if value is not None}
    total = math.fsum(map(math.exp, sound.values()))
    if total > MOST:
        return Verdict(invalid=(f"{len(sound)} tokens have a probability of {total:.2f} together",))
    weights = restricted(sound, options)
    return Verdict(weights) if weights else Verdict(invalid=(f"no token is one of {', '.join(options)}",))


def _is_logprob(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value <= ROUNDING


def restricted(candidates: Mapping[str, float], options: Sequence[str]) -> dict[str, float]:
    """Probabilities of the options among candidate tokens, given as log-probabilities in nat, and renormalised.

    White space around a token and capitals do not matter: what they tell apart is added up. Empty where none of the
    candidates is an option. Of 0.5 for "4", 0.1 for " 4", 0.2 for "5" and 0.2 for "The":

    >>> tops = {"4": math.log(0.5), " 4": math.log(0.1), "5": math.log(0.2), "The": math.log(0.2)}
    >>> {option: round(share, 6) for option, share in restricted(tops, "12345").items()}
    {'4': 0.75, '5': 0.25}
    """
    known = {option.casefold(): option for option in options}
    able = [(known[name], value) for token, value in candidates.items() if (name := token.strip().casefold()) in known]
    highest = max((value for _, value in able), default=0.0)
    found: dict[str, float] = {}
    for option, value in able:
        found[option] = found.get(option, 0.0) + math.exp(value - highest)
    total = math.fsum(found.values())
    return {option: share / total for option, share in sorted(found.items())}


def counted(choices: Sequence[str]) -> dict[str, float]:
    """Shares of the options among several samples.

    >>> counted(["4", "5", "4", "4"])
    {'4': 0.75, '5': 0.25}
    """
    return {option: count / len(choices) for option, count in sorted(Counter(choices).items())}


def chosen(text: str, options: Sequence[str]) -> str | None:
    """The option that a reply consists of, but for a label before it, marks around it and "/5" behind; None if it is
    anything else.

    >>> [chosen(text, "12345") for text in ("4", " **Score:** 4.", "5/5", "4 or 5", "4.5", "-4", "")]
    ['4', '4', '5', None, None, None, None]
    """
    known = {option.casefold(): option for option in options}
    colon = max(map(text.rfind, ":="))
    if colon >= 0 and not _is_label(_bare(text[:colon], before=_BEFORE)):
        return None
    said, slash, most = _bare(text[colon + 1 :], before=_BEFORE, behind=_BEHIND).partition("/")
    if slash and not most.strip().isdecimal():
        return None
    return known.get(_bare(said, behind=_AMID if slash else _BEHIND).casefold())


_BEFORE, _AMID, _BEHIND = "*\"'`([", "*\"'`)]", "*.!\"'`)]"  # marks around an option, beside white space


def _bare(text: str, *, before: str = "", behind: str = "") -> str:
    """A text without white space and these marks at its ends; in time that grows as its length."""
    begin, end = 0, len(text)
    while begin < end and (text[begin].isspace() or text[begin] in before):
        begin += 1
    while begin < end and (text[end - 1].isspace() or text[end - 1] in behind):
        end -= 1
    return text[begin:end]


def _is_label(text: str) -> bool:
    """Letters and blanks, and then nothing that belongs to a word."""
    return not re.search(r"\w", text[len(re.match(r"[a-z ]*", text, re.IGNORECASE)[0]) :])  # type: ignore[index]


def short(text: str, most: int = 120) -> str:
    """A reply as it is quoted in a message."""
    line = " ".join(text.split())
    return repr(line if len(line) <= most else line[:most] + "...")
