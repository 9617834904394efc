"""Quality of free-form answers: by a judge, and by their clarity ([O], table 1).

Every mean is over questions. A question that the judge gave no verdict on is left out of the mean, on both sides where
a model stands beside its base, and counted in `judge.failed_judgements`. What is asked, and how: `bench.measure.judge`.
"""

import functools
from typing import TYPE_CHECKING

from bench.measure.judge.scores import Scores
from bench.metrics.registry import metric

if TYPE_CHECKING:
    from bench.measure.judge.bias import Bias

_judged = functools.partial(metric, unit="score", better="higher", kind="sampled", rel=0.05, floor=0.02)


@_judged("judge.g_eval_correctness", of="judge")
def g_eval_correctness(scores: Scores) -> float:
    """G-Eval, correctness: the judge's weighted score of 1 to 5 as (score - 1) / 4 (Liu et al. 2023; [O], table 1)."""
    return scores.mean("g_eval_correctness")


@_judged("judge.g_eval_relevance", of="judge")
def g_eval_relevance(scores: Scores) -> float:
    """G-Eval, relevance: the judge's weighted score of 1 to 5 as (score - 1) / 4 (Liu et al. 2023; [O], table 1)."""
    return scores.mean("g_eval_relevance")


@_judged("judge.g_eval", of="judge")
def g_eval(scores: Scores) -> float:
    """G-Eval: the mean of correctness and relevance ([O], table 1)."""
    return scores.mean("g_eval")


@_judged("judge.prompt_alignment", of="judge")
def prompt_alignment(scores: Scores) -> float:
    """Prompt alignment: share of the prompt's instructions that an answer follows, by the judge ([O], table 1)."""
    return scores.mean("prompt_alignment")


@metric("judge.failed_judgements", unit="replies", better="lower", kind="counted", of="judge")
def failed_judgements(scores: Scores) -> float:
    """Replies of the judge that were no verdict; they enter no mean."""
    return len(scores.invalid)


@_judged("judge.clarity", of="clarity")
def clarity(scores: Scores) -> float:
    """Clarity: the mean of fluency, coherence and readability of an answer ([O], table 1)."""
    return scores.mean("clarity")


@metric("judge.clarity_paper", unit="score", better="neither", kind="sampled", of="clarity")
def clarity_paper(scores: Scores) -> float:
    """Clarity with the fluency that [O] prints, which grows with perplexity."""
    return scores.mean("clarity_paper")


@_judged("judge.fluency", of="clarity")
def fluency(scores: Scores) -> float:
    """Fluency: 1 / (1 + log2 PPL) of the answer under a small model, of the embedded set the reference's teacher."""
    return scores.mean("fluency")


@metric("judge.fluency_paper", unit="score", better="neither", kind="sampled", of="clarity")
def fluency_paper(scores: Scores) -> float:
    """Fluency as [O] prints it, upside down: 1 - 1 / (1 + log2 PPL), under the same model."""
    return scores.mean("fluency_paper")


@_judged("judge.coherence", of="clarity")
def coherence(scores: Scores) -> float:
    """Coherence: cosine of answer and paragraph, by TF-IDF of words unless a sentence encoder is given."""
    return scores.mean("coherence")


@_judged("judge.readability", of="clarity")
def readability(scores: Scores) -> float:
    """Readability: Flesch's reading ease of the answer, cut to 0..100, / 100; syllables by rule."""
    return scores.mean("readability")


@metric("judge.empty_answers", unit="answers", better="lower", kind="counted", of="clarity")
def empty_answers(scores: Scores) -> float:
    """Answers without a word; each has a clarity of 0."""
    return scores.empty


@_judged("judge.answer_likelihood", of="likelihood")
def answer_likelihood(scores: Scores) -> float:
    """Likelihood of the answer under a local model that reads the paragraph: no G-Eval, and no instructions."""
    return scores.mean("answer_likelihood")


@metric("judge.order_flips", unit="share", better="lower", kind="sampled", of="judge_bias", rel=0.05, floor=0.05)
def order_flips(bias: "Bias") -> float:
    """Share of pairs of answers where the judge prefers a place, whichever answer stands there."""
    return bias.flips


@metric("judge.first_place", unit="share", better="neither", kind="sampled", of="judge_bias")
def first_place(bias: "Bias") -> float:
    """Mean probability that the judge gives to the answer shown first, over both orders: 0.5 without a preference."""
    return bias.first_place


@metric("judge.padding_gain", unit="score", better="neither", kind="sampled", of="judge_bias")
def padding_gain(bias: "Bias") -> float:
    """Mean change of the correctness score where sentences that say nothing are added: at most 0 without a bias."""
    return bias.gain
