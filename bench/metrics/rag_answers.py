"""Quality of answers with and without retrieval ([E], tables 10, 11, 26, 27).

[E]'s token measures are as it defines them (`bench.measure.rag.overlap`), SQuAD's stand beside them. ROUGE is that of
rouge-score (F measure, Porter's stemmer), BLEU that of sacrebleu (sentence BLEU, exponential smoothing, effective
order), both over words of any script (`data.scripts`); BERTScore is that of bert-score. Where a question has answers
in alternative words, the first is the reference, and SQuAD's measures take the best. A mean is over questions and
samples of each; a question that failed counts as an empty answer.
"""

import functools
from collections.abc import Callable
from math import fsum
from typing import TYPE_CHECKING, Any

from bench.data.scripts import spaced, words
from bench.measure.rag import overlap
from bench.measure.rag.records import (
    AnswersReading,
    Replies,
    SimilarityReading,
    contains_truth,
    squad_exact_of,
    squad_f1_of,
    token_exact,
    token_f1,
)
from bench.metrics.registry import metric

if TYPE_CHECKING:
    pass

BOTH_WAYS = 0.05  # share of a mean that near ties, resolved in another way, may move on another machine


def _length(answer: str, one: Replies) -> float:
    return len(overlap.tokens(answer))


_sampled = functools.partial(metric, unit="share", better="higher", kind="sampled", rel=BOTH_WAYS, floor=0.02)


@_sampled("rag.f1", of="rag_answers")
def f1(reading: AnswersReading) -> float:
    """Token F1 with the reference: lower case, split at white space, punctuation kept ([E], tables 10, 11, 26)."""
    return reading.mean(token_f1)


@_sampled("rag.exact_match", of="rag_answers")
def exact_match(reading: AnswersReading) -> float:
    """Share of answers equal to the reference in lower case with white space normalised ([E], tables 10, 11, 26)."""
    return reading.mean(token_exact)


@_sampled("rag.squad_f1", of="rag_answers")
def squad_f1(reading: AnswersReading) -> float:
    """Token F1 as SQuAD's script normalises: no punctuation, no articles; the best of the references."""
    return reading.mean(squad_f1_of)


@_sampled("rag.squad_exact_match", of="rag_answers")
def squad_exact_match(reading: AnswersReading) -> float:
    """Share of answers equal to a reference under SQuAD's normalisation."""
    return reading.mean(squad_exact_of)


@_sampled("rag.faithfulness", of="rag_answers")
def faithfulness(reading: AnswersReading) -> float:
    """Share of the answer's tokens that are in the context ([E], tables 10, 26); 0 for an empty answer."""
    return reading.mean(lambda said, one: overlap.share(overlap.tokens(said), overlap.tokens(one.context)))


@_sampled("rag.faithfulness_normalised", of="rag_answers")
def faithfulness_normalised(reading: AnswersReading) -> float:
    """`faithfulness` over SQuAD's tokens: without the punctuation that hides the last word of every sentence."""
    return reading.mean(lambda said, one: overlap.squad_share(said, one.context))


@_sampled("rag.answer_relevance", of="rag_answers")
def answer_relevance(reading: AnswersReading) -> float:
    """Share of the question's tokens that are in the answer ([E], tables 10, 26): no measure of its being right."""
    return reading.mean(lambda said, one: overlap.share(overlap.tokens(one.question), overlap.tokens(said)))


@_sampled("rag.contains", of="rag_answers")
def contains(reading: AnswersReading) -> float:
    """Share of answers that hold one of the references, whatever else they say, under SQuAD's normalisation."""
    return reading.mean(contains_truth)


class _Words:
    """The tokens of ROUGE: rouge-score's of ASCII texts, which drops every other letter; words of any script beyond."""

    def tokenize(self, text: str) -> list[str]:
        stem = _stemmer().stem
        return [stem(word) if len(word) > 3 and word.isascii() else word for word in words(text)]


@functools.cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


def _rouge_of(name: str) -> Callable[[str, Replies], float]:
    return lambda said, one: _rouge().score(one.truths[0], said)[name].fmeasure


@_sampled("rag.rouge1", of="rag_answers")
def rouge1(reading: AnswersReading) -> float:
    """ROUGE-1 with Porter's stemmer, F measure (Lin 2004; [E], table 26)."""
    return reading.mean(_rouge_of("rouge1"))


@_sampled("rag.rouge2", of="rag_answers")
def rouge2(reading: AnswersReading) -> float:
    """ROUGE-2 with Porter's stemmer, F measure; 0 for a reference of one word (Lin 2004; [E], table 26)."""
    return reading.mean(_rouge_of("rouge2"))


@_sampled("rag.rouge_l", of="rag_answers")
def rouge_l(reading: AnswersReading) -> float:
    """ROUGE-L with Porter's stemmer: longest common subsequence, F measure (Lin 2004; [E], table 26)."""
    return reading.mean(_rouge_of("rougeL"))


@_sampled("rag.bleu", of="rag_answers")
def bleu(reading: AnswersReading) -> float:
    """Sentence BLEU, smoothed, 0 to 1 (Papineni et al. 2002; Post 2018; [E], table 10)."""
    from sacrebleu import sentence_bleu

    def apart(text: str) -> str:  # sacrebleu's own tokenizer then sees letters of scripts without spaces as words
        return text if text.isascii() else spaced(text)

    return reading.mean(lambda said, one: sentence_bleu(apart(said), [apart(one.truths[0])]).score / 100)


@metric("rag.answer_length", unit="words", better="neither", kind="sampled", of="rag_answers")
def answer_length(reading: AnswersReading) -> float:
    """Mean words of an answer with retrieval ([E], table 27)."""
    return reading.mean(_length)


@metric("rag.failed_questions", unit="questions", better="lower", kind="counted", of="rag_answers")
def failed_questions(reading: AnswersReading) -> float:
    """Questions that could not be searched for or answered; each counts as an empty answer in the means."""
    return sum(any(said.error for said in (*one.rag, *one.bare)) for one in reading.replies)


@metric("rag.f1_spread", unit="share", better="neither", kind="sampled", of="rag_spread")
def f1_spread(reading: AnswersReading) -> float:
    """Standard deviation over the seeds of the mean token F1."""
    return reading.spread(token_f1)


@metric("rag.exact_match_spread", unit="share", better="neither", kind="sampled", of="rag_spread")
def exact_match_spread(reading: AnswersReading) -> float:
    """Standard deviation over the seeds of the share of exact matches."""
    return reading.spread(token_exact)


@metric("rag.no_rag_f1", unit="share", better="neither", kind="sampled", of="rag_comparison")
def no_rag_f1(reading: AnswersReading) -> float:
    """Token F1 of answers without a context ([E], table 27)."""
    return reading.mean(token_f1, bare=True)


@metric("rag.no_rag_exact_match", unit="share", better="neither", kind="sampled", of="rag_comparison")
def no_rag_exact_match(reading: AnswersReading) -> float:
    """Exact matches of answers without a context ([E], table 27)."""
    return reading.mean(token_exact, bare=True)


@_sampled("rag.f1_improvement", of="rag_comparison")
def f1_improvement(reading: AnswersReading) -> float:
    """Token F1 with retrieval - without ([E], table 27)."""
    return f1(reading) - no_rag_f1(reading)


@_sampled("rag.exact_match_improvement", of="rag_comparison")
def exact_match_improvement(reading: AnswersReading) -> float:
    """Exact matches with retrieval - without ([E], table 27)."""
    return exact_match(reading) - no_rag_exact_match(reading)


@metric("rag.no_rag_answer_length", unit="words", better="neither", kind="sampled", of="rag_comparison")
def no_rag_answer_length(reading: AnswersReading) -> float:
    """Mean words of an answer without a context ([E], table 27)."""
    return reading.mean(_length, bare=True)


@_sampled("rag.bertscore_f1", of="rag_bertscore")
def bertscore_f1(reading: SimilarityReading) -> float:
    """BERTScore F1 of answers with retrieval, without rescaling (Zhang et al., arXiv 1904.09675; [E], table 26)."""
    return fsum(reading.values) / len(reading.values)
