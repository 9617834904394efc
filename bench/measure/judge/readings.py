"""Measurements of judged answers, as the metrics read them."""

from collections.abc import Callable, Sequence
from typing import Any

from bench.data.scripts import is_english
from bench.measure.decoding import thinking_in
from bench.measure.judge import alignment, g_eval
from bench.measure.judge import clarity as clear
from bench.measure.judge.answers import Answered
from bench.measure.judge.asking import Judge
from bench.measure.judge.scores import Scores
from bench.results.items import hashes_of


def judged(judge: Judge, steps: dict[str, str], answers: Sequence[Answered]) -> Scores:
    """G-Eval and prompt alignment of answers."""
    by_criterion = g_eval.judged(judge, steps, answers)
    verdicts = alignment.judged(judge, answers)
    by: dict[str, tuple[float | None, ...]] = {
        f"g_eval_{name}": tuple(g_eval.scaled(g_eval.score(each)) if each.valid else None for each in found)
        for name, found in by_criterion.items()
    }
    by["g_eval"] = tuple(
        None if None in scores else sum(scores) / len(scores) for scores in zip(*by.values(), strict=True)
    )
    by["prompt_alignment"] = tuple(alignment.share(each) for each in verdicts)
    every = [*(each for found in by_criterion.values() for each in found), *(each for one in verdicts for each in one)]
    invalid = tuple(why for verdict in every for why in verdict.invalid)
    return _scores(answers, by, invalid=invalid, params={"scores": judge.how})


def clarity(
    answers: Sequence[Answered],
    perplexities: Callable[[Sequence[str]], Sequence[float]] | None,
    coherence: Callable[[Sequence[Answered]], Sequence[float]],
) -> Scores:
    """Clarity of answers, and its parts; without fluency where no model knows their language, and without readability
    where the paragraphs are not English."""
    parts = clear.clarity(answers, perplexities, coherence)
    by = {
        "clarity": tuple(each.mean for each in parts),
        "clarity_paper": tuple(each.mean_paper for each in parts),
        **{name: tuple(getattr(each, name) for each in parts)
           for name in ("fluency", "fluency_paper", "coherence", "readability")},
    }  # fmt: skip
    refused = {}
    if perplexities is None:
        refused |= dict.fromkeys(("fluency", "fluency_paper", "clarity", "clarity_paper"), clear.NO_MODEL)
    if not is_english(list(dict.fromkeys(each.asked.context for each in answers))):
        refused |= dict.fromkeys(("readability", "clarity", "clarity_paper"), clear.NOT_ENGLISH)
    return _scores(answers, by, empty=sum(not clear.words(each.text) for each in answers), refused=refused)


def likelihood(answers: Sequence[Answered], values: Sequence[float]) -> Scores:
    """Likelihoods of answers."""
    return _scores(answers, {"answer_likelihood": tuple(values)})


def _scores(answers: Sequence[Answered], by: dict[str, tuple[Any, ...]], **more: Any) -> Scores:
    hashes = hashes_of([each.asked.prompt, each.asked.truths] for each in answers)
    return Scores(hashes=hashes, by=by, thinking=thinking_in(answers).remark, **more)
