"""Log-likelihoods of many token sequences as one prefix tree: shared prefixes are computed once.

The sequences, sorted, are the leaves of a tree whose branches are their common beginnings. A branch with more below it
than one forward pass may hold (`tokens`) is read into a cache, and its sub-branches are taken in turn; those that fit
are read side by side in one row: every token attends to the cache and to its own ancestors alone, at the position that
it has in its sequence. No token is read twice, and no padding is read at all.

That needs a model whose attention takes a mask of its own over a cache. `shares` finds out by comparing logits with
those of one plain pass for each sequence; where they differ, and where a sequence is longer than a sliding window or
than what the model's rotary positions are indifferent to (`bench.measure.rope`), sequences are read one by one instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bench.errors import MetricError
from bench.measure import rope
from bench.measure.scoring import prefix_cache
from compression import caches
from compression.architectures import decoder
from compression.checkpoints.tokens import check_ids, common

PIECE = 2048  # tokens of one sequence read in one forward pass, at most
ELEMENTS = 2**25  # positions x vocabulary of the logits that exist at once: 128 MiB of fp32
AGREE = 0.05  # relative error of logits, by norm: rounding of a packed kernel is below, another mask far above


@dataclass(frozen=True)
class Request:
    """`ids[first:]` are scored, each given all ids before it."""

    ids: tuple[int, ...]
    first: int


@dataclass
class _Leaf:
    """A sequence to read, and what is wanted of it: (position whose logits are meant, target, index of request)."""

    ids: tuple[int, ...]
    wanted: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class Tree:
    """Reads sequences with a model (a causal decoder of transformers in eval mode).

    Attributes:
        tokens: read side by side in one forward pass, at most.
        rows: sequences read side by side in one forward pass, at most; None: as many as `tokens` allow.
        shared: whether beginnings are shared.
    """

    model: Any
    tokens: int
    rows: int | None = None
    shared: bool = True

    def score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """For each request the log-likelihood (nat) of its scored ids, and whether each is the likeliest there.

        Raises MetricError where the model's logits are not finite, CheckpointError for ids that it does not know.
        """
        for request in requests:
            check_ids(request.ids, self.model.config.vocab_size, "a text")
        found: dict[tuple[int, ...], _Leaf] = {}
        for number, request in enumerate(requests):
            leaf = found.setdefault(request.ids[:-1], _Leaf(request.ids[:-1]))
            leaf.wanted += [(at - 1, request.ids[at], number) for at in range(request.first, len(request.ids))]
        self._sums = [0.0] * len(requests)
        self._greedy = [True] * len(requests)
        bounds = [getattr(self.model.config, "sliding_window", None), rope.limit(self.model.config)]
        longest = min(filter(None, bounds), default=max(map(len, found), default=0)) if self.shared else 0
        alone = [leaf for leaf in found.values() if len(leaf.ids) > longest]
        leaves = sorted((leaf for leaf in found.values() if len(leaf.ids) <= longest), key=lambda leaf: leaf.ids)
        with torch.inference_mode():
            for leaf in alone:
                rope.forget(self.model)
                hidden = self._alone(leaf.ids)
                self._add(hidden, leaf.wanted)
            if leaves:
                rope.forget(self.model)
                self._leaves = leaves
                self._common = [0, *(common(one.ids, two.ids) for one, two in pairwise(leaves))]
                self._held = prefix_cache.new_cache(self.model)
                self._branch(0, len(leaves), 0)
                del self._held
        return list(zip(self._sums, self._greedy, strict=True))

    def _alone(self, ids: Sequence[int]) -> Tensor:
        """Hidden states (tokens, width) of a sequence that is read by itself."""
        if caches.replaying.policy_of(self.model) is not None:
            return caches.replaying.hidden(self.model, self._tensor(ids))[0]
        return self._decoder(input_ids=self._tensor(ids), use_cache=False).last_hidden_state[0]

    @property
    def _decoder(self) -> Any:
        return self.model.get_decoder()

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)

    def _size(self, begin: int, end: int, depth: int) -> int:
        """Tokens behind the first `depth` of leaves begin:end, what they share counted once."""
        rest = sum(len(self._leaves[n].ids) - self._common[n] for n in range(begin + 1, end))
        return len(self._leaves[begin].ids) - depth + rest

    def _fits(self, begin: int, end: int, depth: int) -> bool:
        few = self.rows is None or end - begin <= self.rows
        return few and self._size(begin, end, depth) <= self.tokens

    def _branch(self, begin: int, end: int, depth: int) -> None:
        """Leaves begin:end, whose first `depth` tokens are in the cache."""
        if end - begin > 1 and self._fits(begin, end, depth):
            self._side_by_side(begin, end, depth)
            return
        shared = min(self._common[begin + 1 : end], default=len(self._leaves[begin].ids))
        self._along(begin, end, depth, shared)
        waiting: tuple[int, int] | None = None  # sub-branches that are read together
        for first, last in self._below(begin, end, shared):
            if waiting and self._fits(waiting[0], last, shared):
                waiting = (waiting[0], last)
                continue
            if waiting:
                self._side_by_side(*waiting, shared)
            waiting = (first, last) if self._fits(first, last, shared) else None
            if waiting is None:
                self._branch(first, last, shared)
                prefix_cache.cut(self._held, shared)
        if waiting:
            self._side_by_side(*waiting, shared)

    def _below(self, begin: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
        """Sub-branches: the leaves that go on with the same token; a leaf that ends at `depth` has been read."""
        first = begin + (len(self._leaves[begin].ids) == depth)
        for n in range(first + 1, end):
            if self._common[n] == depth:
                yield first, n
                first = n
        if first < end:
            yield first, end

    def _along(self, begin: int, end: int, depth: int, until: int) -> None:
        """Read tokens depth:until of a branch into the cache."""
        ids = self._leaves[begin].ids
        wanted = [one for leaf in self._leaves[begin:end] for one in leaf.wanted]
        for at in range(depth, until, PIECE):
            stop = min(at + PIECE, until)
            out = self._decoder(input_ids=self._tensor(ids[at:stop]), past_key_values=self._held, use_cache=True)
            here = [(place - at, *what) for place, *what in wanted if at <= place < stop]
            self._add(out.last_hidden_state[0], here)

    def _side_by_side(self, begin: int, end: int, depth: int) -> None:
        """Read leaves begin:end behind the cache in one row, and cut the cache back."""
        fed: list[int] = []
        positions: list[int] = []
        path: list[int] = []  # place in `fed` of each token of the leaf behind `depth`
        wanted = []
        tokens = self._size(begin, end, depth)
        sees = torch.zeros(tokens, depth + tokens, dtype=torch.bool)
        sees[:, :depth] = True
        for n in range(begin, end):
            leaf = self._leaves[n]
            known = depth if n == begin else max(self._common[n], depth)
            at, new = len(fed), len(leaf.ids) - known
            path = [*path[: known - depth], *range(at, at + new)]
            fed += leaf.ids[known:]
            positions += range(known, len(leaf.ids))
            sees[at : at + new, [depth + place for place in path[: known - depth]]] = True
            sees[at : at + new, depth + at : depth + at + new] = torch.ones(new, new, dtype=torch.bool).tril()
            wanted += [(path[place - depth], *what) for place, *what in leaf.wanted if place >= depth]
        hidden = self._decoder(
            input_ids=self._tensor(fed),
            position_ids=self._tensor(positions),
            attention_mask=self._mask(sees),
            past_key_values=self._held,
            use_cache=True,
        ).last_hidden_state[0]
        prefix_cache.cut(self._held, depth)
        self._add(hidden, wanted)

    def _mask(self, sees: Tensor) -> Tensor:
        """What attention takes, (1, 1, tokens, cached tokens and tokens)."""
        sees = sees[None, None].to(self.model.device)
        if self.model.config._attn_implementation == "sdpa":
            return sees
        dtype = self.model.dtype
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)

    def _add(self, hidden: Tensor, wanted: Sequence[tuple[int, int, int]]) -> None:
        """Log-likelihoods of targets from hidden states (tokens, width), added to the sums of their requests."""
        places = sorted({place for place, _, _ in wanted})
        row = {place: n for n, place in enumerate(places)}
        chunk = max(1, ELEMENTS // self.model.config.vocab_size)
        logits_of = decoder.logits_of(self.model)
        for start in range(0, len(places), chunk):
            rows = range(start, min(start + chunk, len(places)))
            logits = logits_of(hidden[places[start : start + chunk]]).float()
            here = [(row[place] - start, target, number) for place, target, number in wanted if row[place] in rows]
            at = torch.tensor([(n, target) for n, target, _ in here], device=logits.device)
            values = (logits[at[:, 0], at[:, 1]] - logits.logsumexp(-1)[at[:, 0]]).tolist()
            likeliest = (logits.argmax(-1)[at[:, 0]] == at[:, 1]).tolist()
            for (_, target, number), value, best in zip(here, values, likeliest, strict=True):
                if not -float("inf") < value < float("inf"):
                    raise MetricError(
                        f"the model gives token {target} of request {number} a log-likelihood of {value}: its weights "
                        "or activations have overflowed"
                    )
                self._sums[number] += value
                self._greedy[number] &= best


def shares(model: Any) -> bool:
    """Whether a model's logits after three short sequences with a common beginning, read as a tree, are those alone.

    Found out once for each model. Where keys and values are quantized they are not: a sequence has groups of its own.
    """
    if caches.replaying.policy_of(model) is not None:
        return False
    if model not in _SHARES:
        _SHARES[model] = _agrees(model)
    return _SHARES[model]


_SHARES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _agrees(model: Any) -> bool:
    vocabulary = model.config.vocab_size
    start = [(7 * n + 3) % vocabulary for n in range(8)]
    requests = [Request((*start, *((5 * n + k) % vocabulary for n in range(8))), 8) for k in (1, 2, 4)]
    ways = []
    for shared in (True, False):
        probe = _Probe(model, tokens=16, shared=shared)
        try:
            probe.score(requests)
        except (TypeError, ValueError, IndexError, RuntimeError):  # of a forward that cannot take the mask
            return False
        ways.append(torch.stack([logits for _, logits in sorted(probe.logits.items())]))
    together, alone = (way - way.mean(-1, keepdim=True) for way in ways)
    return bool((together - alone).norm() <= AGREE * alone.norm())


class _Probe(Tree):
    """Keeps the logits that requests are scored by: by number of the request and target, which it has once."""

    def _add(self, hidden: Tensor, wanted: Sequence[tuple[int, int, int]]) -> None:
        self.logits = getattr(self, "logits", {})
        for place, target, number in wanted:
            self.logits[number, target] = decoder.logits_of(self.model)(hidden[place]).float()
