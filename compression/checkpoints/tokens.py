"""Turns text into token ids, and conversations into text, the same way for prompts, answers, training and counting.

- What a tokenizer puts before a text, its beginning of sequence (BOS), stands there once. A conversation has what its
  chat template writes and no more, as in transformers' `apply_chat_template` and in engines that serve one; a plain
  text that begins with a BOS gets no second one.
- What a tokenizer puts behind a text, an end of sequence (EOS), is taken off: behind a prompt it would say that there
  is nothing to answer.
- Texts that follow each other, as prompt and answer, are encoded as the one text that they are, and split: a token that
  reaches over a border belongs to the text that it ends in. Encoded apart they have other tokens: SentencePiece puts a
  space before each of them, and no merge reaches from one to the next.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from compression.errors import CheckpointError

TEMPLATE_ARGUMENTS = {"enable_thinking": False}  # of chat templates, unless others are given


class Templated(str):
    """A conversation in a chat template, which has all special tokens that belong to it."""


class Tokens(NamedTuple):
    """Token ids, and the characters begin:end that each stands for; None where the tokenizer cannot tell."""

    ids: list[int]
    spans: list[tuple[int, int]] | None


def tokens_of(tokenizer: Any, text: str, *, special: bool = True) -> Tokens:
    """A text as tokens, behind what the tokenizer puts before one unless `special` is off or a template wrote it.

    Raises CheckpointError for a tokenizer that puts more than a beginning and an end around a text.
    """
    fast = getattr(tokenizer, "is_fast", False)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = list(found["input_ids"])
    spans = [(begin, end) for begin, end in found["offset_mapping"]] if fast else None
    lead = _lead(tokenizer, text) if special and not isinstance(text, Templated) else []
    if ids[: len(lead)] == lead or (lead and ids[:1] == [getattr(tokenizer, "bos_token_id", None)]):
        lead = []
    return Tokens(lead + ids, None if spans is None else [(0, 0)] * len(lead) + spans)


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """The ids of `tokens_of`."""
    return tokens_of(tokenizer, text, special=special).ids


def encode_parts(tokenizer: Any, parts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """The ids of texts that follow each other, encoded as one text; a part may have none.

    >>> from compression.checkpoints.base import byte_tokenizer
    >>> encode_parts(byte_tokenizer(), ["A:", " B"]) == [encode(byte_tokenizer(), "A:"), encode(byte_tokenizer(), " B")]
    True
    """
    whole = "".join(parts)
    special = special and not isinstance(parts[0], Templated)
    ids, spans = tokens_of(tokenizer, whole, special=special)
    found: list[list[int]] = []
    begin = border = 0
    for part in parts[:-1]:
        border += len(part)
        if spans is None:
            split = common(ids, encode(tokenizer, whole[:border], special=special))
        else:
            split = next((at for at, (_, end) in enumerate(spans) if end > border), len(ids))
        found.append(ids[begin : max(begin, split)])
        begin = max(begin, split)
    return [*found, ids[begin:]]


def conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any] | None = None, **how: Any
) -> Templated:
    """Messages in a tokenizer's chat template, for `encode`.

    Args:
        messages: each with role and content.
        arguments: of the template, beside and before `TEMPLATE_ARGUMENTS`.
        how: of transformers' `apply_chat_template`, such as add_generation_prompt.
    """
    given = {**TEMPLATE_ARGUMENTS, **(arguments or {})}
    return Templated(tokenizer.apply_chat_template(list(messages), tokenize=False, **how, **given))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def check_ids(ids: Sequence[int], vocabulary: int, what: str) -> None:
    """Raises CheckpointError for ids that a model of so many tokens does not know; `what` has them."""
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = next(each for each in ids if not 0 <= each < vocabulary)
        raise CheckpointError(f"{what} has token {wrong}, and the model knows {vocabulary}: tokenizer and model are "
                              "not of one checkpoint")  # fmt: skip


def reserved() -> frozenset[str]:
    """Names that rendering a chat template has for itself."""
    from transformers import PreTrainedTokenizerBase

    return frozenset({"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters})


def check_template(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a tokenizer has no chat template, or one that reads none of these arguments."""
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(f"arguments of the chat template are given ({', '.join(arguments)}), and the tokenizer "
                              "has no chat template")  # fmt: skip
    read = _read_by(tokenizer.get_chat_template())
    if unknown := sorted(set(arguments) - read):
        known = ", ".join(sorted(read - reserved() - set(tokenizer.special_tokens_map))) or "no argument"
        raise CheckpointError(f"the chat template does not read {', '.join(unknown)}; it reads {known}")


def _read_by(template: str) -> frozenset[str]:
    """Variables that a chat template reads and does not set."""
    from jinja2 import Environment, meta, nodes
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        """{% generation %}, by which transformers marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = Environment(extensions=[Generation, loopcontrols], autoescape=False)  # which only parses
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


def _lead(tokenizer: Any, text: str) -> list[int]:
    """What a tokenizer puts before a text; what it puts behind is looked at, and left."""
    for probe in ("a", text):
        bare = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
        around = list(tokenizer(probe, verbose=False)["input_ids"])
        if around == bare:
            return []
        for at in range(len(around) - len(bare) + 1 if bare else 0):
            if around[at : at + len(bare)] == bare:
                return around[:at]
        if bare:
            raise CheckpointError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} makes {around} of {probe[:40]!r} and {bare} "
                "without special tokens: they must stand before and behind a text alone"
            )
    return [token for token in around[:1] if token == getattr(tokenizer, "bos_token_id", None)]
