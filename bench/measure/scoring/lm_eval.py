"""A language model for lm-eval that shares work: the scores of its own `HFLM`, several times faster.

Log-likelihoods are those of a tree of all requests (`prefix_tree`): examples that many questions begin with, and the
question that several choices follow, are read once; a choice of one token costs nothing beyond its question. Answers
come from `measure.answering`. Sums are taken in float32 from float32 logits and do not depend on the batch by more than
`TOLERANCE` where the model computes in float32 (packed layers, which have another kernel for few rows than for many: by
its rounding, up to 0.05 nat on the embedded reference), and than `TOLERANCE_16` in 16 bits. The outlier columns of
LLM.int8() are those of the whole batch, and its scores depend on it by their nature.

Tokens are those of `HFLM` where it encodes prompt and choice as the one text that they are (`checkpoints.tokens`). It
does not where a merge reaches over the border between them, or the tokenizer ends every text with a token of its own. A
request longer than the context loses its beginning, as there, which `Scorer.truncated` counts; a choice that is longer
by itself has no score.
"""

import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from bench.errors import DataError, OptionError
from bench.measure.answering import Answer, Sampling, answer
from bench.measure.decoding import Thinking
from bench.measure.scoring.prefix_tree import Request, Tree, shares
from compression.checkpoints.tokens import Templated, common, conversation, encode, encode_parts

TOLERANCE = 1e-3  # nat, of the log-likelihood of one choice, where the model computes in float32
TOLERANCE_16 = 1.0  # where it computes in 16 bits; half of the reference's choices differ by less than 0.02
TOKENS = {"cpu": 512, "cuda": 4096}  # read side by side in one forward pass, at most
NEW_TOKENS = 256  # of an answer, where its task does not say


class Scorer(TemplateLM):
    """Scores requests of lm-eval with a causal decoder of transformers, in eval mode and on its device.

    Args:
        rows: sequences read side by side in one forward pass, at most; None: as many as `TOKENS` of the device allow.
        tokens: instead of `TOKENS`.
        seed: of sampled answers.
        template: arguments of the tokenizer's chat template.

    Attributes:
        shared: whether the model's attention lets sequences share what they begin with; else each is read alone.
        thinking: what was cut of answers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        rows: int | None = None,
        tokens: int | None = None,
        seed: int = 1234,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self._begin(tokenizer, model.config.max_position_embeddings, seed, template)
        self.model, self.shared = model, shares(model)
        self._tree = Tree(model, tokens=tokens or TOKENS.get(model.device.type, TOKENS["cpu"]), rows=rows,
                          shared=self.shared)  # fmt: skip

    def _begin(self, tokenizer: Any, positions: int, seed: int, template: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.tokenizer, self.positions, self.seed, self.template = tokenizer, positions, seed, template
        self.thinking = Thinking()
        self._cut: set[tuple[int, ...]] = set()  # prompts longer than the context
        self._ids = functools.lru_cache(maxsize=256, typed=True)(lambda text: tuple(encode(tokenizer, text)))

    def score_all(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """For each request the log-likelihood (nat) of its scored ids, and whether each is the likeliest there."""
        return self._tree.score(requests)

    def answer_all(
        self, prompts: Sequence[list[int]], new_tokens: int, stops: Sequence[str], sampling: Sampling | None
    ) -> list[Answer]:
        """Answers to prompts of token ids, in their order."""
        return answer(
            self.model, self.tokenizer, prompts, new_tokens=new_tokens, stops=stops, sampling=sampling, seed=self.seed
        )  # fmt: skip

    @property
    def truncated(self) -> int:
        """Different prompts that lost their beginning."""
        return len(self._cut)

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it. Raises DataError where the tokenizer has nothing."""
        for found in (self.tokenizer.bos_token_id, self.eot_token_id):
            if found is not None:
                return found
        raise DataError("the tokenizer has neither a beginning (bos_token) nor an end of sequence (eos_token), one of "
                        "which must stand before a text that is scored with nothing before it")  # fmt: skip

    @property
    def max_length(self) -> int:
        return self.positions

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return encode(self.tokenizer, string, special=False) if add_special_tokens is False else list(self._ids(string))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the context and those that are scored, encoded together; white space between is scored, as there.

        Behind an empty context stands what a text begins with.
        """
        bare = context.rstrip()
        special = bool(bare) and not isinstance(context, Templated)
        before, scored = encode_parts(self.tokenizer, [bare, context[len(bare) :] + continuation], special=special)
        if not before and scored[:1] == [self.prefix_token_id]:
            return scored[:1], scored[1:]
        return before or [self.prefix_token_id], scored

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return conversation(
            self.tokenizer,
            chat_history,
            self.template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tokens(self, requests: Sequence[Instance]) -> tuple[int, int]:
        """Tokens that requests make the model read, shared beginnings counted once, and those that it may write."""
        sequences, written = set(), 0
        for one in requests:
            if one.request_type == "generate_until":
                sequences.add(tuple(self.tok_encode(one.args[0])))
                written += _generation(one.args[1], None)[1] * one.repeats
            else:
                context, scored = self._encode_pair(*one.args)
                sequences.add((*context, *scored)[:-1])
        ordered = sorted(sequences)
        repeated = sum(common(one, two) for one, two in pairwise(ordered)) if self.shared else 0
        return sum(map(len, ordered)) - repeated, written

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Raises DataError for a choice without tokens, and one that is longer than the context."""
        return self._loglikelihood_tokens([(one.args, *self._encode_pair(*one.args)) for one in requests])

    def mean_logprobs(self, contexts: Sequence[str], texts: Sequence[str]) -> list[float]:
        """Mean log-probability (nat per token) of each text after its context; after the start of a text where that is
        empty. Raises as `loglikelihood`."""
        pairs = [((one, two), *self._encode_pair(one, two)) for one, two in zip(contexts, texts, strict=True)]
        sums = self._loglikelihood_tokens(pairs)
        return [value / len(scored) for (value, _), (_, _, scored) in zip(sums, pairs, strict=True)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Each request is (what it is called, ids of the context, ids that are scored)."""
        wanted = []
        for name, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                text = repr(name[-1][:60]) if name else "a piece of a text"
                raise DataError(f"{text} has {len(continuation)} tokens to be scored; it must have 1 to "
                                f"{self.max_length}, the positions of the model")  # fmt: skip
            context = context or [self.prefix_token_id]
            ids = (*context, *continuation)[-(self.max_length + 1) :]
            if len(ids) < len(context) + len(continuation):
                self._cut.add(tuple(context))
            wanted.append(Request(ids, len(ids) - len(continuation)))
        return self.score_all(wanted)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in disjoint windows of the context behind one token, as `HFLM` cuts them."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            cut = utils.get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            pairs = [(None, *utils.make_disjoint_window(pair)) for pair in cut]
            windows += pairs
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Raises OptionError for a setting of generation that `bench.measure.answering` does not know."""
        groups: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(place)
        found: dict[int, str] = {}
        end = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        for places in groups.values():
            stops, new_tokens, sampling = _generation(requests[places[0]].args[1], end)
            room = self.max_length - new_tokens
            if room < 1:
                raise OptionError(
                    f"a task generates {new_tokens} new tokens, more than the {self.max_length} positions of the model"
                )
            prompts = []
            for place in places:
                ids = self.tok_encode(requests[place].args[0])
                if len(ids) > room:
                    self._cut.add(tuple(ids))
                prompts.append(ids[-room:])
            said = self.answer_all(prompts, new_tokens, stops, sampling)
            self.thinking.count(said)
            found.update(zip(places, (one.text for one in said), strict=True))
        return [found[place] for place in range(len(requests))]


def _generation(settings: dict[str, Any], end: str | None) -> tuple[list[str], int, Sampling | None]:
    """(stops, new tokens, sampling) of a task's settings."""
    known = dict(normalize_gen_kwargs(settings, NEW_TOKENS))
    stops = handle_stop_sequences(known.pop("until", None), eos=end)
    new_tokens, sampled = known.pop("max_gen_toks"), known.pop("do_sample")
    values = {name: known.pop(name, 1.0) for name in ("temperature", "top_p", "repetition_penalty")}
    if known:
        raise OptionError(f"generation settings {', '.join(known)} are unknown; allowed are until, max_gen_toks, "
                          "do_sample, temperature, top_p and repetition_penalty")  # fmt: skip
    return [stop for stop in stops if stop], new_tokens, Sampling(**values) if sampled else None
