"""Tokens that scoring a task takes, counted on the first questions of each of its parts."""

from dataclasses import dataclass
from typing import Any

from bench.data.tasks.table import SEED
from bench.measure.scoring.prepare import Prepared

FEW, MORE = 4, 8  # questions of a part whose requests are counted


@dataclass(frozen=True)
class TaskTokens:
    """Tokens of a task for one model.

    Attributes:
        read: of prompts and choices, shared beginnings once.
        written: of answers, if each uses all tokens that the task allows.
        prompts: a few of its prompts, as token ids.
    """

    read: float
    written: float
    prompts: tuple[tuple[int, ...], ...]


def task_tokens(prepared: Prepared, scorer: Any, *, limit: int | None = None, chat: bool = False) -> TaskTokens:
    """Count the tokens of a task for a `scoring.lm_eval.Scorer`; arguments as for `bench.metrics.tasks.score`.

    Parts of up to MORE questions are counted exactly. Of others, each further question counts as much as the average of
    the questions between FEW and MORE: examples that all questions begin with are then counted once.
    """
    read = written = 0.0
    prompts: list[tuple[int, ...]] = []
    for name, places in prepared.questions(limit).items():
        part, asked = prepared.parts[name], len(places)
        _build(part, scorer, min(MORE, asked), chat)
        few, more = (
            scorer.tokens([each for each in part.instances if each.doc_id < count]) for count in (FEW, MORE)
        )  # fmt: skip
        beyond = max(0, asked - MORE) / (MORE - FEW)
        read += more[0] + beyond * (more[0] - few[0])
        written += more[1] + beyond * (more[1] - few[1])
        if len(prompts) < MORE:
            firsts = {each.doc_id: each for each in reversed(part.instances)}
            prompts += [tuple(scorer.tok_encode(each.args[0])) for _, each in sorted(firsts.items())]
    return TaskTokens(read, written, tuple(dict.fromkeys(filter(None, prompts[:MORE]))))


def _build(part: Any, scorer: Any, count: int, chat: bool) -> None:
    """The requests of the first questions of a part."""
    part.set_fewshot_seed(seed=SEED)
    part.build_all_requests(
        samples=range(count), rank=0, world_size=1, apply_chat_template=chat, fewshot_as_multiturn=chat,
        chat_template=scorer.apply_chat_template if chat else None,
        tokenizer_name=scorer.tokenizer_name if chat else "",
    )  # fmt: skip
