"""Which tokens a perplexity protocol feeds and which of them it scores; see `bench.metrics.perplexity`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.data.sources import CONVERSATIONS, LANGUAGE, Data, Message, plain
from bench.errors import DataError, OptionError
from compression.checkpoints.tokens import conversation as render
from compression.checkpoints.tokens import tokens_of
from compression.files.strict_json import at_least

Template = Mapping[str, Any] | None
BLANK = 10  # characters; protocol "e" drops rows of no more


class Window(NamedTuple):
    """Tokens `begin:end` are fed; of them `first_scored:end` are scored. All are positions in the whole text."""

    begin: int
    end: int
    first_scored: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Token ids fed to the model, of which `ids[first_scored:]` are scored."""

    ids: Sequence[int]
    first_scored: int
    n_bytes: int | None  # of the scored text in UTF-8; None if that cannot be told exactly
    label: str  # where it is in the data, for messages
    cut: bool = False  # the text goes on, but is not scored further


def windows(n_tokens: int, length: int, stride: int | None = None) -> list[Window]:
    """Windows over a text of `n_tokens` tokens. The last one may be shorter; one with nothing to score is left out.

    Disjoint (stride None or equal to length): all tokens but the first of each window are scored once. With a smaller
    stride all but token 0 are scored once, and from the second window on with at least length - stride tokens before.
    Raises OptionError for a stride outside 1..length, which would leave tokens out.

    >>> windows(10, 4, 2)[:2]
    [Window(begin=0, end=4, first_scored=1), Window(begin=2, end=6, first_scored=4)]
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise OptionError(f"stride must be from 1 to the window length {length}, not {stride}")
    found, scored_to = [], 0
    for begin in range(0, n_tokens, stride):
        window = Window(begin, min(begin + length, n_tokens), max(scored_to, begin + 1))
        if window.first_scored < window.end:
            found.append(window)
        scored_to = window.end
        if window.end == n_tokens:
            break
    return found


def spread(count: int, samples: int) -> list[int]:
    """`samples` positions evenly over `count`, both ends included; all of them where there are no more.

    >>> spread(4358, 100)[:3], spread(4358, 100)[-1], spread(3, 100)
    ([0, 44, 88], 4357, [0, 1, 2])
    """
    if samples >= count:
        return list(range(count))
    return [i * (count - 1) // max(samples - 1, 1) for i in range(samples)]


def samples_of(
    tokenizer: Any, data: Data, protocol: "PerplexityProtocol", *, context: int, template: Template = None
) -> list[Sample]:
    """What the protocol scores, as token ids; `context` is the longest sequence the model takes, in tokens.

    `template` are arguments of the tokenizer's chat template.

    Raises DataError where there is less text than one sample needs, OptionError where `length` exceeds the context.
    """
    length = protocol.length or context
    if length > context:
        raise OptionError(
            f"perplexity length={length} exceeds the {context} positions of the model; give a smaller --length"
        )
    what = data.describe(protocol.split, what=protocol.what)
    if protocol.name == "default":
        whole = _encode(tokenizer, "\n\n".join(data.texts(protocol.split)), special=False)
        if len(whole.ids) < length:
            raise DataError(f"{what}, has {len(whole.ids)} tokens; one window needs {length}: give more text")
        parts = windows(len(whole.ids), length, protocol.stride)
        places = range(len(parts))[: protocol.samples] if data.drawn else spread(len(parts), protocol.samples)
        return [whole.sample(parts[i], f"tokens {parts[i].begin}:{parts[i].end}") for i in places]

    found = []
    for label, row in _rows(tokenizer, data, protocol, template):
        parts = windows(len(row.ids), length, protocol.stride)
        kept = parts if protocol.stride else parts[:1]
        found += [row.sample(part, label, cut=kept[-1].end < len(row.ids)) for part in kept]
    if not found:
        raise DataError(f"{what}, has no row of 2 tokens among the {protocol.samples} looked at; perplexity needs one")
    return found


@dataclass(frozen=True)
class _Tokens:
    """A text as token ids, with the characters that each stands for where the tokenizer can tell."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]] | None

    def sample(self, window: Window, label: str, *, cut: bool = False) -> Sample:
        begin, end, first = window
        ids, n_bytes = self.ids[begin:end], self._bytes(first, end)
        return Sample(ids=ids, first_scored=first - begin, n_bytes=n_bytes, label=label, cut=cut)

    def _bytes(self, first: int, end: int) -> int | None:
        """Bytes of UTF-8 in tokens first:end; None unless both cuts fall between two characters."""
        if self.spans is None:
            return None
        start, stop = self.spans[first][0], self.spans[end - 1][1]
        clean = all(self.spans[at - 1][1] == self.spans[at][0] for at in (first, end) if at < len(self.ids))
        return len(self.text[start:stop].encode()) if clean and start < stop else None


def _encode(tokenizer: Any, text: str, *, special: bool = True) -> _Tokens:
    return _Tokens(text, *tokens_of(tokenizer, text, special=special))


def _rows(
    tokenizer: Any, data: Data, protocol: "PerplexityProtocol", template: Template
) -> Iterator[tuple[str, _Tokens]]:
    """(where, tokens) of the rows that "e", or the conversations that "o" scores."""
    rows = data.source(protocol.split, what=protocol.what).rows
    for i in spread(len(rows), protocol.samples):
        if protocol.name == "o":
            yield f"conversation {i}", _encode_chat(tokenizer, rows[i], i, template)
        elif len(text := rows[i].strip()) > BLANK:
            yield f"row {i}", _encode(tokenizer, text)


def _encode_chat(tokenizer: Any, conversation: list[Message], number: int, template: Template) -> _Tokens:
    if not getattr(tokenizer, "chat_template", None):
        return _encode(tokenizer, plain(conversation))
    from jinja2 import TemplateError

    try:
        text = render(tokenizer, conversation, template)
    except TemplateError as error:
        raise DataError(f"conversation {number} does not fit the tokenizer's chat template: {error}") from error
    return _encode(tokenizer, text)


PROTOCOLS = ("default", "e", "o")


@dataclass(frozen=True, kw_only=True)
class PerplexityProtocol:
    """What is scored and how; see the module. Raises OptionError for values that cannot be.

    `length` None is 512 tokens, and for "o" the whole conversation; `stride` None is disjoint windows, and for "e" one
    window per row ("o" has none); `batch_size` None fits the token budget of the device.
    """

    name: str = "default"
    samples: int = 100
    length: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    split: str = "test"

    def __post_init__(self) -> None:
        if self.name not in PROTOCOLS:
            raise OptionError(f"perplexity protocol must be one of {', '.join(PROTOCOLS)}, not {self.name!r}")
        for name, least in (("samples", 1), ("length", 2), ("stride", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None:
                at_least(f"perplexity {name}", value, least, OptionError)
        if self.length is None and self.name != "o":
            object.__setattr__(self, "length", 512)
        if self.stride is not None and (self.name == "o" or self.stride > self.length):
            allowed = "left out: 'o' scores whole conversations" if self.name == "o" else f"at most {self.length}"
            raise OptionError(f"perplexity stride must be {allowed}, not {self.stride}")

    @property
    def shown_stride(self) -> int | None:
        """The stride as it stands in the key of a row: that of disjoint windows is their length."""
        return self.stride or (self.length if self.name == "default" else None)

    @property
    def what(self) -> str:
        """The kind of rows it reads."""
        return CONVERSATIONS if self.name == "o" else LANGUAGE
