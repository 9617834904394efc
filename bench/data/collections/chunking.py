"""Cuts documents into chunks, each a slice of the document's text.

    tokens     `size` tokens each; the last `overlap` of a chunk begin the next
    sentences  whole sentences up to `size` tokens; the last ones that fit into `overlap` tokens begin the next
    headings   a section each, heading included; one longer than `size` tokens is cut by tokens
    documents  a document each, however long

Headings are those of Markdown (# and underlined) and of WikiText (= title =). Every letter of a document that is not
blank is in a chunk, and no chunk is blank.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.data.scripts import sentence_ends, token_spans
from bench.errors import OptionError
from compression.files.strict_json import at_least

BY = ("tokens", "sentences", "headings", "documents")
Span = tuple[int, int]  # characters begin:end
Tokenize = Callable[[str], Sequence[Span]]

_HEADING = re.compile(r"^(?:#{1,6} .*|[^\n]+\n(?:={3,}|-{3,})|\s?=+ [^=\n]+ =+\s?)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How documents are cut. Raises OptionError for values that cannot be."""

    by: str = "tokens"
    size: int = 512  # tokens
    overlap: int = 50  # tokens

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise OptionError(f"--chunking must be one of {', '.join(BY)}, not {self.by}")
        at_least("--chunk-size", self.size, 1, OptionError)
        if not 0 <= self.overlap < self.size:
            raise OptionError(
                f"--chunk-overlap must be from 0 to {self.size - 1}, below --chunk-size, not {self.overlap}"
            )

    @property
    def text(self) -> str:
        """What it is, as it stands in the key of a row."""
        return self.by if self.by == "documents" else f"{self.by}-{self.size}-{self.overlap}"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """`text` is characters `begin:end` of the document."""

    document: str  # its id
    text: str
    begin: int
    end: int


def cut(document: str, text: str, chunking: Chunking, tokenize: Tokenize = token_spans) -> list[Chunk]:
    """The chunks of a document's text in order; none of a blank one.

    >>> [c.text for c in cut("d", "One two. Three four. Five.", Chunking(by="sentences", size=6, overlap=3))]
    ['One two. Three four.', 'Three four. Five.']
    """
    spans = {"tokens": _by_tokens, "sentences": _by_sentences, "headings": _by_headings, "documents": _whole}[
        chunking.by
    ](text, chunking, tokenize)
    tidy = (_stripped(text, *span) for span in spans)
    return [Chunk(document=document, text=text[begin:end], begin=begin, end=end) for begin, end in tidy if begin < end]


def _whole(text: str, chunking: Chunking, tokenize: Tokenize) -> Iterator[Span]:
    yield 0, len(text)


def _by_tokens(text: str, chunking: Chunking, tokenize: Tokenize) -> Iterator[Span]:
    tokens = tokenize(text)
    for first in range(0, len(tokens), chunking.size - chunking.overlap):
        last = min(first + chunking.size, len(tokens))
        begin = tokens[first][0] if first else 0
        yield begin, (tokens[last][0] if last < len(tokens) else len(text))
        if last == len(tokens):
            return


def _by_sentences(text: str, chunking: Chunking, tokenize: Tokenize) -> Iterator[Span]:
    """A sentence longer than `size` is a chunk of its own."""
    ends = [*sentence_ends(text), len(text)]
    sentences = [(begin, end) for begin, end in zip([0, *ends], ends, strict=False) if text[begin:end].strip()]
    costs = [len(tokenize(text[begin:end])) for begin, end in sentences]
    first = last = 0
    while last < len(sentences):
        last = max(last, first) + 1  # at least one that is new
        while last < len(sentences) and sum(costs[first : last + 1]) <= chunking.size:
            last += 1
        yield sentences[first][0], sentences[last - 1][1]
        first = last
        while first > 0 and last < len(sentences) and sum(costs[first - 1 : last]) <= chunking.overlap and (
            sum(costs[first - 1 : last + 1]) <= chunking.size
        ):  # fmt: skip
            first -= 1


def _by_headings(text: str, chunking: Chunking, tokenize: Tokenize) -> Iterator[Span]:
    starts = sorted({0, *(match.start() for match in _HEADING.finditer(text))})
    for begin, end in zip(starts, [*starts[1:], len(text)], strict=True):
        section = text[begin:end]
        long = len(tokenize(section)) > chunking.size
        inner = _by_tokens(section, chunking, tokenize) if long else [(0, len(section))]
        yield from ((begin + a, begin + b) for a, b in inner)


def _stripped(text: str, begin: int, end: int) -> Span:
    piece = text[begin:end]
    return begin + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
