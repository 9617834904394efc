"""From generated ids to text, and from text to the answer.

A continuation is decoded with what came before it and that is taken off again: decoders of SentencePiece drop the space
that a text begins with, which is the first of a completion as well. Special tokens are left out, but for the marks
around thinking. Text up to the end of thinking is no answer, nor is thinking that has no end; a prompt may have begun
it, as templates do that end with the mark.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

THINKING = {  # what begins it, and what ends it
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "[THINK]": "[/THINK]",
}
_MARKS = (*THINKING, *THINKING.values())


class Parts(NamedTuple):
    """What was written: `thought`, marks included, and the `answer`; `finished` is unset for thinking without end."""

    thought: str
    answer: str
    finished: bool


class Decoder:
    """Decodes with one tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        special = {str(token): id_ for id_, token in added if token.special}
        special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.special: dict[str, int] = special  # ids by text
        self._left_out = {id_ for token, id_ in special.items() if token not in _MARKS}

    def __call__(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([n for n in ids if n not in self._left_out]))

    def behind(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of ids that follow others."""
        known, whole = self(before), self([*before, *ids])
        return whole[len(known) :] if whole.startswith(known) else self(ids)  # bytes of no character spoil those before


def begun(text: str) -> bool:
    """Whether a prompt ends with the mark that thinking begins with.

    >>> begun("Where?<think>\\n"), begun("Where?<think>\\n\\n</think>\\n\\n")
    (True, False)
    """
    return text.rstrip().endswith(tuple(THINKING))


def parts(text: str, *, begun: bool = False) -> Parts:
    """What was written in parts; `begun` if the prompt had begun the thinking.

    >>> parts("<think>Hm.</think>Paris")
    Parts(thought='<think>Hm.</think>', answer='Paris', finished=True)
    """
    ends = [text.rfind(mark) + len(mark) for mark in THINKING.values() if mark in text]
    thought, rest = text[: max(ends, default=0)], text[max(ends, default=0) :]
    if begun and not ends:
        return Parts(text, "", False)
    found = [at for mark in THINKING if (at := rest.find(mark)) >= 0]
    if found:
        return Parts(thought + rest[min(found) :], rest[: min(found)], False)
    return Parts(thought, rest, True)


class Answering:
    """Follows a text that is being written: whether there is a stop in its answer.

    Args:
        stops: texts that end an answer; within thinking they end nothing.
        begun: whether the prompt had begun the thinking.
    """

    def __init__(self, stops: Sequence[str], *, begun: bool):
        self._stops, self._thinking = stops, begun
        self._text = ""
        self._from = 0  # where what is looked through begins

    def stopped(self, new: str) -> bool:
        """Whether there is one, with more of the text."""
        self._text += new
        text = self._text[self._from :]
        stop = -1 if self._thinking else _first(text, self._stops)[0]
        at, mark = _first(text, THINKING.values() if self._thinking else THINKING)
        if stop >= 0 and not 0 <= at < stop:
            return True
        if at >= 0:
            self._thinking = not self._thinking
            self._from += at + len(mark)
            return self.stopped("")
        self._from = max(self._from, len(self._text) - max(map(len, (*self._stops, *_MARKS))))
        return False


def _first(text: str, wanted: Iterable[str]) -> tuple[int, str]:
    """Where the first of some texts is in another, and which; -1 where none is."""
    return min(((at, each) for each in wanted if (at := text.find(each)) >= 0), default=(-1, ""))


class Thoughtful(Protocol):
    """An answer, whoever keeps it."""

    @property
    def thought(self) -> str: ...

    @property
    def finished(self) -> bool: ...


@dataclass
class Thinking:
    """How many answers came with thinking, which was cut."""

    answers: int = 0
    cut: int = 0
    unfinished: int = 0

    def count(self, answers: Iterable[Thoughtful]) -> None:
        for each in answers:
            self.answers += 1
            self.cut += bool(each.thought)
            self.unfinished += not each.finished

    @property
    def remark(self) -> str | None:
        """What a reader of the scores must know, or None."""
        if not self.cut:
            return None
        never = f", which {self.unfinished} never ended" if self.unfinished else ""
        return f"{self.cut} of {self.answers} answers came with thinking{never}: it was cut"


def thinking_in(answers: Iterable[Thoughtful]) -> Thinking:
    """How many of these answers came with thinking."""
    found = Thinking()
    found.count(answers)
    return found
