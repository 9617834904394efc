"""Answers: what a model writes after prompts, greedy or sampled, up to a stop.

Prompts are grouped by what they begin with (`SHARED` tokens in common or more): each group's longest common beginning
is read once and its keys and values copied to the rows, which are batched by the length of their rest and padded on the
left. Positions count real tokens alone, so that an answer does not depend on what shares its batch but for the last
bits of its sums; a row that is done leaves the batch when half of the rows are. Stops are looked for in new text only:
each token is decoded once, with the few before it that its characters may depend on. A model whose attention takes no
cache with a mask (`prefix_tree.shares`) reads each prompt by itself, from its beginning for every token; one whose keys
and values are quantized by itself too, behind a cache of its own.

A sampled token comes from the distribution that transformers' processors make, in their order: repetition penalty,
temperature, top-p (Keskar et al., arXiv 1909.05858, section 4.1; Holtzman et al., arXiv 1904.09751), by inversion of
its distribution function at a number that is fixed by the seed, the prompt's place and the token's. Departure from
`generate`: no top-k; and padding is no text that a repetition could repeat.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.errors import MetricError, OptionError
from bench.measure import rope, scoring
from bench.measure.decoding import Answering, Decoder, begun, parts
from compression import caches
from compression.checkpoints.tokens import check_ids, common, encode
from compression.files.strict_json import at_least

if TYPE_CHECKING:
    from torch import Tensor

SHARED = 64  # tokens in common that are worth reading apart
TOKENS = 32_768  # held by the cache of one batch, at most
ROWS = 64  # of one batch, at most
REASONS = ("stop", "end", "length")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Raises OptionError for a temperature or penalty that is not above 0, or top_p outside 0..1.

    The defaults are those of [E] for answers with retrieval.
    """

    temperature: float = 0.3
    top_p: float = 0.9
    repetition_penalty: float = 1.15

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                hint = "; for greedy answers pass sampling=None" if name == "temperature" else ""
                raise OptionError(f"{name} must be above 0 and finite, not {value!r}{hint}")
        if self.top_p > 1:
            raise OptionError(f"top_p must be at most 1, not {self.top_p!r}")


@dataclass(frozen=True)
class Answer:
    """What was written after one prompt.

    Attributes:
        text: behind any thinking up to the first stop, without it and without special tokens.
        tokens: generated, those of thinking and the one that ended the answer included.
        reason: "stop" (a stop text), "end" (an end-of-sequence token) or "length" (all tokens allowed were written).
        thought: the thinking that was cut, marks included.
        finished: unset where the thinking has no end.
    """

    text: str
    tokens: int
    reason: str
    thought: str = ""
    finished: bool = True


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    new_tokens: int,
    stops: Sequence[str] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Answer]:
    """Answers in the order of the prompts.

    Args:
        model: a causal decoder of transformers, in eval mode.
        prompts: texts, plain or in a chat template, or token ids as they are.
        new_tokens: written for each, at most.
        stops: texts that end an answer; one that is a special token, such as "</s>", ends it as that token.
        sampling: None is greedy.
        seed: of the drawn tokens; a prompt's numbers are fixed by it and by the prompt's place.

    Raises:
        OptionError: a prompt is empty or, with `new_tokens`, longer than the model's positions; an empty stop.
        CheckpointError: a prompt has an id that the model does not know.
        MetricError: the model's logits are not finite.
    """
    import torch

    at_least("new_tokens", new_tokens, 1, OptionError)
    if "" in stops:
        raise OptionError("stops must not contain an empty string: every answer contains it")
    ids = [encode(tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    _check(ids, new_tokens, model.config)
    decoder = Decoder(tokenizer)
    ending = [decoder.special[stop] for stop in stops if stop in decoder.special]
    ends = _ends((model.generation_config, model.config, tokenizer), ending)
    found: dict[int, Answer] = {}
    cached = not ids or scoring.prefix_tree.shares(model)
    limit = rope.limit(model.config)
    alone = [place for place, prompt in enumerate(ids)
             if not cached or (limit is not None and len(prompt) + new_tokens > limit)]  # fmt: skip
    together = sorted(set(range(len(ids))) - set(alone))
    with torch.inference_mode():
        for places, shared in (*(([place], 0) for place in alone), *_groups(ids, together, new_tokens)):
            if _slides(model.config, max(len(ids[place]) for place in places) + new_tokens):
                shared = 0  # a window counts the padding behind what is shared
            rows = [_Row(place, ids[place], decoder, stops) for place in places]
            rope.forget(model)
            _write(model, rows, shared, ends, new_tokens, sampling, seed, cached)
            found.update({row.place: row.answer(ends) for row in rows})
    return [found[place] for place in range(len(ids))]


def answers_of(
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    *,
    stops: Sequence[str],
    ends: set[int],
) -> list[Answer]:
    """The answers that tokens stand for which another program wrote behind prompts; `ends` are ids that end one."""
    decoder, found = Decoder(tokenizer), []
    for place, (prompt, ids) in enumerate(zip(prompts, written, strict=True)):
        row = _Row(place, list(prompt), decoder, stops)
        for token in ids:
            row.add(token, ends)
            if row.done:
                break
        found.append(row.answer(ends))
    return found


def stop_tokens(tokenizer: Any, config: Any, stops: Sequence[str]) -> set[int]:
    """Ids that end an answer: the end of a sequence by tokenizer and configuration, and stops that are one token."""
    special = Decoder(tokenizer).special
    return _ends((config, tokenizer), [special[stop] for stop in stops if stop in special])


def distribution(logits: "Tensor", sampling: Sampling, seen: "Tensor | None" = None) -> "Tensor":
    """Probabilities of the next token, (rows, vocabulary) in float64.

    `seen` (rows, vocabulary) marks the tokens of the text so far, which the repetition penalty makes less likely.
    """
    import torch

    logits = logits.double()
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    shares = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ranked, order = shares.sort(dim=-1, descending=True, stable=True)
        outside = ranked.cumsum(-1) - ranked >= sampling.top_p  # the likelier ones reach top_p without it
        shares = shares.masked_fill(outside.gather(-1, order.argsort(-1)), 0)
        shares = shares / shares.sum(-1, keepdim=True)
    return shares


@dataclass
class _Row:
    """One answer being written: its text is decoded as it grows."""

    place: int
    prompt: list[int]
    decoder: Decoder
    stops: Sequence[str]
    ids: list[int] = field(default_factory=list)  # generated
    done: bool = False

    def __post_init__(self) -> None:
        self._all = list(self.prompt)
        self._begin, self._read = 0, len(self._all)  # _all[_begin:_read] is text already, decoded again for the next
        self._begun = begun(self.decoder(self.prompt[-64:]))
        self._answer = Answering(self.stops, begun=self._begun)

    def add(self, token: int, ends: set[int]) -> None:
        self.ids.append(token)
        self._all.append(token)
        self.done = token in ends or (bool(self.stops) and self._stopped())

    def _stopped(self) -> bool:
        """Whether a stop is in the text, the new part of which is looked through."""
        new = self.decoder.behind(self._all[self._begin : self._read], self._all[self._read :])
        if not new or new.endswith("\ufffd"):  # a character is not complete
            return False
        self._begin, self._read = self._read, len(self._all)
        return self._answer.stopped(new)

    def answer(self, ends: set[int]) -> Answer:
        ended = bool(self.ids) and self.ids[-1] in ends
        text = self.decoder.behind(self.prompt, self.ids[:-1] if ended else self.ids)
        thought, text, finished = parts(text, begun=self._begun)
        found = [at for at in map(text.find, self.stops) if at >= 0]
        reason = "stop" if found else "end" if ended else "length"
        return Answer(text[: min(found)] if found else text, len(self.ids), reason, thought, finished)


def _check(ids: Sequence[Sequence[int]], new_tokens: int, config: Any) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    for place, prompt in enumerate(ids):
        if not prompt:
            raise OptionError(f"prompt {place} is empty: it must have at least one token")
        check_ids(prompt, config.vocab_size, f"prompt {place}")
        if positions and len(prompt) + new_tokens > positions:
            raise OptionError(
                f"prompt {place} has {len(prompt)} tokens, with new_tokens={new_tokens} more than the {positions} "
                "positions of the model; shorten the prompt or generate fewer"
            )


def _ends(sources: Sequence[Any], more: Sequence[int]) -> set[int]:
    """Ids of the end-of-sequence tokens of all sources, and of more."""
    configured = [getattr(each, "eos_token_id", None) for each in sources]
    found = {n for each in configured for n in (each if isinstance(each, list | tuple) else [each]) if n is not None}
    return found | set(more)


def _slides(config: Any, tokens: int) -> bool:
    """Whether some layer sees less than so many tokens."""
    window = getattr(config, "sliding_window", None)
    return window is not None and window < tokens


def _groups(ids: Sequence[Sequence[int]], places: Sequence[int], new_tokens: int) -> Iterator[tuple[list[int], int]]:
    """(places of the prompts of a batch, tokens that they have in common), longest prompts first within a group.

    Of `ids` those at `places` are put in groups. A group is a stretch of the prompts in sorted order where neighbours
    share a beginning; all that share none with a neighbour are one group. The last token of a prompt is never shared:
    its logits are wanted.
    """
    runs: list[list[int]] = []
    for place in sorted(places, key=lambda place: ids[place]):
        if runs and common(ids[runs[-1][-1]], ids[place]) >= SHARED:
            runs[-1].append(place)
        else:
            runs.append([place])
    alone = [run[0] for run in runs if len(run) == 1]
    for run in [*(run for run in runs if len(run) > 1), *([alone] if alone else [])]:
        shared = min(common(ids[run[0]], ids[run[-1]]), *(len(ids[place]) - 1 for place in run))
        shared = shared if shared >= SHARED and len(run) > 1 else 0
        run.sort(key=lambda place: (-len(ids[place]), place))
        while run:
            count = max(1, min(ROWS, TOKENS // (len(ids[run[0]]) + new_tokens)))
            yield run[:count], shared
            run = run[count:]


def _write(
    model: Any,
    rows: list[_Row],
    shared: int,
    ends: set[int],
    new_tokens: int,
    sampling: Sampling | None,
    seed: int,
    cached: bool,
) -> None:
    """Write the answers of one batch, whose prompts have their first `shared` tokens in common."""
    import torch

    device = model.device
    seen = draws = None
    if sampling is not None:
        generators = [torch.Generator().manual_seed(seed_of(seed, row.place)) for row in rows]  # equal on every device
        draws = torch.stack([torch.rand(new_tokens, generator=g, dtype=torch.float64) for g in generators]).to(device)
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=device)
            for row, marks in zip(rows, seen, strict=True):
                marks[row.prompt] = True
    cache = scoring.prefix_cache.new_cache(model) if cached else None
    if caches.replaying.policy_of(model) is not None:
        cache = caches.replaying.new_cache(model)
    if shared:
        scoring.prefix_cache.read(model, rows[0].prompt[:shared], cache)
        cache = scoring.prefix_cache.take(
            cache, [0] * len(rows), max(len(row.prompt) for row in rows) - shared + new_tokens
        )
    fed, mask = _padded(rows, shared, device)
    for step in range(new_tokens):
        at = (mask.cumsum(1) - 1)[:, -fed.shape[1] :].clamp(min=0)
        out = model(
            input_ids=fed, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=cache is not None,
            logits_to_keep=1,
        )  # fmt: skip
        logits = out.logits[:, -1].float()
        if not bool(logits.amax(-1).isfinite().all()):
            raise MetricError(f"the model's logits are not finite after prompt {rows[0].place} and those beside it: "
                              "its weights or activations have overflowed")  # fmt: skip
        if sampling is None or draws is None:
            chosen = logits.argmax(-1)
        else:
            chosen = _sampled(distribution(logits, sampling, seen), draws[:, step : step + 1])
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if not row.done:
                row.add(token, ends)
        going = [n for n, row in enumerate(rows) if not row.done]
        if not going:
            return
        fed = chosen[:, None] if cache is not None else torch.cat([fed, chosen[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        if 2 * len(going) <= len(rows):
            rows, fed, mask = [rows[n] for n in going], fed[going], mask[going]
            cache = scoring.prefix_cache.take(cache, going, new_tokens - step)
            seen, draws = (None if each is None else each[going] for each in (seen, draws))


def _padded(rows: list[_Row], shared: int, device: Any) -> "tuple[Tensor, Tensor]":
    """What is fed after the shared tokens, (rows, width), padded on the left, and the mask, (rows, shared + width)."""
    import torch

    width = max(len(row.prompt) for row in rows)
    fed = [[0] * (width - len(row.prompt)) + row.prompt[shared:] for row in rows]
    mask = [[1] * shared + [0] * (width - len(row.prompt)) + [1] * (len(row.prompt) - shared) for row in rows]
    return torch.tensor(fed, device=device), torch.tensor(mask, device=device)


def _sampled(distribution: "Tensor", draws: "Tensor") -> "Tensor":
    """A token of each row, (rows,), of a distribution (rows, vocabulary), by draws (rows, 1) in [0, 1)."""
    import torch

    mass = distribution.cumsum(-1)
    return torch.searchsorted(mass, draws * mass[:, -1:], right=True)[:, 0].clamp(max=mass.shape[-1] - 1)


def seed_of(seed: int, place: int) -> int:
    """The seed of what is drawn for the prompt at a place: below 2**56, so that every generator takes it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:7], "big")
