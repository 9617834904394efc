"""A local model as judge: any base, which gives log-probabilities of the options themselves.

It always gives a choice, also where it understands nothing of what it is asked: how well it tells right answers from
wrong ones has to be measured (`benchmarks/judges.py`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import compression
from bench.errors import JudgeError
from bench.measure import scoring
from bench.measure.answering import answer
from bench.measure.judge.asking import Verdict, weighed
from bench.results.row import Input
from compression.checkpoints.tokens import conversation, encode

STEPS_TOKENS = 256


class LocalJudge:
    """Judges with a base (`--base` of `pytest bench`: a folder, a hub id, reference ...), opened at its first use.

    Prompts go into the tokenizer's chat template where it has one.
    """

    how = "logprobs"

    def __init__(self, spec: str, device: str = "cpu"):
        self.spec, self.device = spec, device
        source = compression.locate(spec)
        if source.kind == "named":
            source = source.fetch()
        self.name = f"local:{source.label}"
        known = source.kind == "folder" or source.folder is not None
        digest = source.digest if known else None  # what the hub has goes by its name alone
        self.read = Input(self.name, digest, named=source.kind != "folder")

    @functools.cached_property
    def opened(self) -> tuple[Any, Any]:
        """Model and tokenizer. Raises JudgeError where there is no tokenizer."""
        import compression

        base = compression.open_base(self.spec, self.device, dequantize=True)
        if base.tokenizer is None:
            raise JudgeError(f"--judge {self.spec} has no tokenizer: put tokenizer.json beside its weights")
        return base.model, base.tokenizer

    @functools.cached_property
    def _scorer(self) -> Any:
        return scoring.lm_eval.Scorer(*self.opened)

    def write(self, prompt: str) -> str:
        """The likeliest text, of at most `STEPS_TOKENS` tokens; a base that continues texts may write anything.

        Raises JudgeError where all of it is thinking that has no end.
        """
        model, tokenizer = self.opened
        [said] = answer(model, tokenizer, [self._templated(prompt)], new_tokens=STEPS_TOKENS)
        if not said.finished:
            raise JudgeError(f"the judge {self.name} was still thinking after {said.tokens} tokens of evaluation steps")
        return said.text.strip()

    def choose(self, prompts: Sequence[str], options: Sequence[str]) -> list[Verdict]:
        """See `asking.Judge`. A prompt that is longer than the model's context has no judgement."""
        from lm_eval.api.instance import Instance

        _, tokenizer = self.opened
        lead = "" if tokenizer.chat_template else " "
        texts = [self._templated(prompt) for prompt in prompts]
        room = self._scorer.max_length - max(8, *(len(encode(tokenizer, lead + option)) for option in options))
        lengths = [len(encode(tokenizer, text)) for text in texts]
        able = [place for place, length in enumerate(lengths) if length <= room]
        requests = [
            Instance("loglikelihood", {}, (texts[place], lead + option), number)
            for number, (place, option) in enumerate((place, option) for place in able for option in options)
        ]
        logprobs = iter(value for value, _ in (self._scorer.loglikelihood(requests) if requests else []))
        found = {place: weighed({option: next(logprobs) for option in options}, options) for place in able}
        return [
            found[place] if place in found else
            Verdict(invalid=(f"a prompt of {length} tokens does not fit into the {room} positions of {self.name}",))
            for place, length in enumerate(lengths)
        ]  # fmt: skip

    def _templated(self, prompt: str) -> str:
        _, tokenizer = self.opened
        if not tokenizer.chat_template:
            return prompt
        message = [{"role": "user", "content": prompt}]
        return conversation(tokenizer, message, add_generation_prompt=True)
