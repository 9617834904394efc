"""The requests of lm-eval, answered by an engine."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.errors import NotAvailable
from bench.measure.answering import Answer, Sampling, answers_of, seed_of, stop_tokens
from bench.measure.engines.engine import Drawn, Engine
from bench.measure.scoring.lm_eval import Scorer
from bench.measure.scoring.prefix_tree import Request


class EngineScorer(Scorer):
    """As `Scorer`, of what an engine serves: the same prompts, tokens, stops, and the same cuts of answers.

    Args:
        config: of the base, which says what ends an answer.

    Attributes:
        shared: always true: what prompts begin with is the engine's matter.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, config: Any, *, seed: int = 1234,
        template: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        positions = min(engine.options.max_length - 1, config.max_position_embeddings)  # an engine scores no last place
        self._begin(tokenizer, positions, seed, template)
        self.engine, self._config, self.shared = engine, config, True

    def score_all(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Each request by itself; equal ones are read once."""
        found: dict[tuple[int, ...], Any] = {}
        for each in requests:
            if each.ids not in found:
                (found[each.ids],) = self.engine.logprobs([list(each.ids)], top=1)
        return [_sum(found[each.ids], each) for each in requests]

    def answer_all(
        self, prompts: Sequence[list[int]], new_tokens: int, stops: Sequence[str], sampling: Sampling | None
    ) -> list[Answer]:
        """Raises NotAvailable for a repetition penalty, which engines count by rules of their own."""
        if sampling is not None and sampling.repetition_penalty != 1:
            raise NotAvailable("engines are asked for temperature and top_p, and this task wants a repetition penalty")
        ends = stop_tokens(self.tokenizer, self._config, stops)
        batch, written = self.engine.options.sequences, []
        for at in range(0, len(prompts), batch):
            drawn = sampling and Drawn(
                temperature=sampling.temperature, top_p=sampling.top_p,
                seeds=tuple(seed_of(self.seed, place) for place in range(len(prompts))[at : at + batch]),
            )  # fmt: skip
            found = self.engine.generate(prompts[at : at + batch], new_tokens, stop_ids=sorted(ends), sampling=drawn)
            written += [each.ids for each in found]
        return answers_of(self.tokenizer, prompts, written, stops=stops, ends=ends)


def _sum(scores: Any, request: Request) -> tuple[float, bool]:
    places = range(request.first - 1, len(request.ids) - 1)
    greedy = all(scores.top[place][0][0] == request.ids[place + 1] for place in places)
    return sum(scores.logprobs[place] for place in places), greedy
