"""What RAG's metrics say: worked by hand, beside libraries, and the laws that they must keep."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rag_replies import said

from bench.errors import MetricError
from bench.measure.rag import overlap, ranking, records
from bench.measure.rag.prompts import Said
from bench.measure.rag.records import AnswersReading, Context, ContextReading, RankingReading, Replies
from bench.metrics import all_metrics, rag_answers, rag_retrieval, rag_robustness, rag_speed

WORDS = ["the", "a", "42", "coins", "coins.", "red", "Red", "grams"]
texts = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)
names = [str(n) for n in range(12)]
gains = st.dictionaries(st.sampled_from(names), st.integers(1, 4), max_size=6)
rankings = st.permutations(names).flatmap(lambda all_: st.integers(0, 12).map(lambda n: all_[:n]))


def test_the_tokens_of_the_paper_keep_punctuation_and_those_of_squad_do_not():
    reading = AnswersReading((said("The 42 coins."),))

    assert rag_answers.f1(reading) == pytest.approx(2 * 1 / (3 + 2))
    assert rag_answers.squad_f1(reading) == 1.0
    assert (rag_answers.exact_match(reading), rag_answers.squad_exact_match(reading)) == (0.0, 1.0)


def test_faithfulness_is_the_share_of_different_answer_tokens_in_the_context():
    reading = AnswersReading((said("42 42 coins red", context="it costs 42 grams"),))

    assert rag_answers.faithfulness(reading) == pytest.approx(1 / 3)


def test_faithfulness_misses_the_last_word_of_a_sentence_unless_it_is_normalised():
    reading = AnswersReading((said("42 coins"),))

    assert (rag_answers.faithfulness(reading), rag_answers.faithfulness_normalised(reading)) == (0.5, 1.0)


def test_answer_relevance_is_the_share_of_question_tokens_in_the_answer():
    reading = AnswersReading((said("It has a price", question="Which price has it?"),))

    assert rag_answers.answer_relevance(reading) == 2 / 4  # "price", "has"; not "it?"


def test_rouge_counts_stems_bigrams_and_subsequences():
    reading = AnswersReading((said("the cats sat quietly", truths=["the cat quietly sat"]),))

    assert rag_answers.rouge1(reading) == 1.0
    assert rag_answers.rouge2(reading) == pytest.approx(1 / 3)
    assert rag_answers.rouge_l(reading) == pytest.approx(3 / 4)


def test_bleu_of_an_equal_answer_is_one_and_of_a_foreign_one_near_zero():
    assert rag_answers.bleu(AnswersReading((said("a b c d e", truths=["a b c d e"]),))) == pytest.approx(1)
    assert rag_answers.bleu(AnswersReading((said("v w x y z", truths=["a b c d e"]),))) < 0.05


def test_bleu_worked_by_hand():
    """Precisions 3/4, 2/3, 1/2 of orders 1 to 3, smoothed 1/(2*1) of order 4; equal lengths, so no penalty."""
    reading = AnswersReading((said("a b c x", truths=["a b c d"]),))

    assert rag_answers.bleu(reading) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_improvement_is_the_difference_to_answers_without_context():
    reading = AnswersReading((said("42 coins", bare=["42 grams"]), said("red", bare=["red"])))

    assert rag_answers.f1(reading) == 0.5
    assert rag_answers.no_rag_f1(reading) == 0.25
    assert rag_answers.f1_improvement(reading) == 0.25
    assert rag_answers.exact_match_improvement(reading) == 0.5


def test_the_spread_is_that_of_the_means_of_the_seeds():
    reading = AnswersReading((said("42 coins", "red"), said("42 coins", "42 grams")))

    assert rag_answers.f1(reading) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert rag_answers.f1_spread(reading) == pytest.approx(statistics.pstdev([1.0, 0.25]))


def test_a_failed_question_counts_as_an_empty_answer():
    reading = AnswersReading((said("42 coins"), Replies(
        id="2", question="q", prompt="q", truths=("red",), context="", rag=(Said(error="OptionError: too long"),)
    )))  # fmt: skip

    assert (rag_answers.f1(reading), rag_answers.failed_questions(reading)) == (0.5, 1)


def test_items_are_one_value_for_each_question_and_tell_questions_apart():
    reading = AnswersReading((said("42 coins"), said("42 grams", question="Which weight has it?")))
    items = reading.items["rag.f1"]

    assert (sorted(items.values), items.kind) == ([0.5, 1.0], "real")
    assert reading.items["rag.exact_match"].kind == "binary"
    assert items.mean == rag_answers.f1(reading)
    assert items.asked == AnswersReading(reading.replies[::-1]).items["rag.f1"].asked
    assert items.asked != AnswersReading(reading.replies[:1] * 2).items["rag.f1"].asked


def test_items_of_several_samples_are_means_and_no_longer_binary():
    items = AnswersReading((said("42 coins", "red"),)).items["rag.exact_match"]

    assert ((0.5,), "real") == (items.values, items.kind)


CONTEXT = ContextReading(
    contexts=(
        Context(question="what costs it", answer="42 coins", chunks=("it costs 42 coins",), scores=(3.0,),
                relevant=(True,)),
        Context(question="its colour", answer="dark red", chunks=("it is dark", "or blue"), scores=(1.0, 2.0),
                relevant=(False, True)),
    )
)  # fmt: skip


def test_the_context_is_measured_as_the_paper_does_it():
    assert rag_retrieval.context_sufficiency(CONTEXT) == 0.5
    assert rag_retrieval.context_precision(CONTEXT) == pytest.approx((2 / 3 + 0) / 2)
    assert rag_retrieval.context_coverage(CONTEXT) == pytest.approx((1 + 1 / 2) / 2)
    assert rag_retrieval.retrieval_score(CONTEXT) == (3.0 + 1.5) / 2
    assert rag_retrieval.retrieval_consistency(CONTEXT) == 0.75
    assert (rag_retrieval.chunks_retrieved(CONTEXT), rag_retrieval.context_length(CONTEXT)) == (1.5, 4.5)


def test_judged_precision_is_the_share_of_relevant_chunks():
    assert rag_retrieval.context_precision_judged(CONTEXT) == (1 + 1 / 2) / 2


def test_an_empty_context_is_worth_nothing_and_is_no_error():
    reading = ContextReading(contexts=(Context(question="q", answer="a", chunks=(), scores=(), relevant=()),))
    of = [m for m in all_metrics().values() if m.of in ("rag_context", "rag_judged_context")]

    assert len(of) == 9
    assert [0.0] * len(of) == [metric(reading) for metric in of]


@pytest.mark.parametrize(("held", "enough"), [(4, True), (3, False)])
def test_a_context_suffices_from_eighty_percent_of_the_answer_on(held, enough):
    answer = [f"w{n}" for n in range(5)]

    assert enough == overlap.sufficient(" ".join(answer), " ".join(reversed(answer[:held])), 0.8)


@given(texts, texts)
def test_f1_is_symmetric_and_within_bounds(a, b):
    value = overlap.f1(overlap.tokens(a), overlap.tokens(b))

    assert 0 <= value <= 1
    assert value == overlap.f1(overlap.tokens(b), overlap.tokens(a))
    assert (value == 1) == (sorted(overlap.tokens(a)) == sorted(overlap.tokens(b)) and bool(a))


@given(texts, texts)
def test_f1_is_the_harmonic_mean_of_matches_counted_one_by_one(a, b):
    given_, left = overlap.tokens(a), overlap.tokens(b)
    wanted, common = len(left), 0
    for token in given_:
        if token in left:
            left.remove(token)
            common += 1
    slow = 2 * (common / len(given_)) * (common / wanted) / (common / len(given_) + common / wanted) if common else 0.0

    assert slow == pytest.approx(overlap.f1(given_, overlap.tokens(b)))


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_squad_measures_are_those_of_the_paper_on_words_without_punctuation_and_articles(answer, truths):
    def kept(text):
        return [w.strip(".").lower() for w in text.split() if w.strip(".").lower() not in ("a", "an", "the")]

    best = max(overlap.f1(kept(answer), kept(t)) if kept(answer) or kept(t) else 1.0 for t in truths)

    assert best == pytest.approx(overlap.squad_f1(answer, truths))
    assert overlap.squad_exact(answer, truths) == (kept(answer) in [kept(t) for t in truths])


@given(texts, texts, texts)
def test_a_share_grows_with_the_whole_and_not_with_order(part, whole, more):
    value = overlap.share(overlap.tokens(part), overlap.tokens(whole))

    assert 0 <= value <= overlap.share(overlap.tokens(part), overlap.tokens(f"{whole} {more}")) <= 1
    assert value == overlap.share(overlap.tokens(part)[::-1], overlap.tokens(whole)[::-1])


@given(texts)
def test_an_answer_equal_to_the_truth_is_right_under_every_measure(text):
    reading = AnswersReading((said(text, truths=[text], context=text),))

    assert rag_answers.exact_match(reading) == rag_answers.squad_exact_match(reading) == 1
    assert rag_answers.squad_f1(reading) == 1
    assert rag_answers.f1(reading) == rag_answers.faithfulness(reading) == float(bool(overlap.tokens(text)))


def trec_eval(found, relevant):
    """trec_eval's own numbers; scores fall with the place, so that it breaks no ties."""
    import pytrec_eval

    wanted = {"map", "recip_rank", "P.1,3,5,10", "recall.1,3,5,10", "ndcg_cut.10"}
    run = {"q": {name: float(len(found) - place) for place, name in enumerate(found)}}
    return pytrec_eval.RelevanceEvaluator({"q": dict(relevant)}, wanted).evaluate(run)["q"]


@given(rankings.filter(bool), gains.filter(bool))
def test_ranking_measures_are_those_of_trec_eval(found, relevant):
    theirs = trec_eval(found, relevant)

    for k in (1, 3, 5, 10):
        assert theirs[f"P_{k}"] == pytest.approx(ranking.precision_at(k, found, relevant), abs=1e-6)
        assert theirs[f"recall_{k}"] == pytest.approx(ranking.recall_at(k, found, relevant), abs=1e-6)
    assert theirs["map"] == pytest.approx(ranking.average_precision(found, relevant), abs=1e-6)
    assert theirs["recip_rank"] == pytest.approx(ranking.reciprocal_rank(found, relevant), abs=1e-6)
    assert theirs["ndcg_cut_10"] == pytest.approx(ranking.ndcg_at(10, found, relevant), abs=1e-6)


def test_the_comparison_with_trec_eval_tells_exponential_gains_from_linear_ones():
    found, relevant = ["b", "a"], {"a": 3, "b": 1}
    exponential = {name: 2**gain - 1 for name, gain in relevant.items()}

    assert trec_eval(found, relevant)["ndcg_cut_10"] != pytest.approx(ranking.ndcg_at(10, found, exponential), abs=1e-3)


@given(rankings, gains, st.integers(1, 12))
def test_recall_grows_with_k_and_hits_too(found, relevant, k):
    assert 0 <= ranking.recall_at(k, found, relevant) <= ranking.recall_at(k + 1, found, relevant) <= 1
    assert ranking.precision_at(k, found, relevant) * k <= ranking.precision_at(k + 1, found, relevant) * (k + 1) + 1e-9


@given(rankings, gains, st.integers(1, 12))
def test_f1_at_k_is_the_harmonic_mean_of_precision_and_recall(found, relevant, k):
    p, r = ranking.precision_at(k, found, relevant), ranking.recall_at(k, found, relevant)

    assert ranking.f1_at(k, found, relevant) == pytest.approx(2 * p * r / (p + r) if p + r else 0.0)


@given(gains.filter(bool), st.permutations(names))
def test_the_ranking_by_gain_is_the_best_of_all_permutations(relevant, shuffled):
    ideal = sorted(names, key=lambda name: -relevant.get(name, 0))

    for measure in (ranking.average_precision, ranking.reciprocal_rank):
        assert measure(shuffled, relevant) <= measure(ideal, relevant) == 1
    assert ranking.ndcg_at(10, shuffled, relevant) <= ranking.ndcg_at(10, ideal, relevant) + 1e-12
    assert ranking.ndcg_at(10, ideal, relevant) == pytest.approx(1)


@given(st.permutations(names), gains, st.permutations(names))
def test_renaming_what_is_ranked_changes_nothing(found, relevant, other):
    renamed = dict(zip(names, other, strict=True))
    there = [renamed[name] for name in found], {renamed[name]: gain for name, gain in relevant.items()}

    for measure in (ranking.average_precision, ranking.reciprocal_rank):
        assert measure(found, relevant) == measure(*there)
    assert ranking.ndcg_at(5, found, relevant) == pytest.approx(ranking.ndcg_at(5, *there))


def test_the_mean_over_questions_is_what_a_ranking_metric_gives():
    reading = RankingReading(rankings=(["a", "b"], ["b", "a"]), gains=({"a": 1}, {"a": 1}))
    metrics = all_metrics()

    assert metrics["rag.mrr"](reading) == 0.75
    assert metrics["rag.precision_at_1"](reading) == 0.5
    assert metrics["rag.recall_at_3"](reading) == 1.0
    assert metrics["rag.f1_at_3"](reading) == 0.5


def test_times_are_medians_over_questions_and_the_share_is_of_retrieval_and_generation():
    common = {"retrieval_s": 0.1, "rag_tokens": 4, "bare_s": 0.1, "bare_tokens": 2}
    reading = records.SpeedReading(questions=tuple(records.Timed(rag_s=s, **common) for s in (0.1, 0.3, 0.9)))

    assert rag_speed.generation_ms(reading) == pytest.approx(300)
    assert rag_speed.retrieval_share(reading) == pytest.approx(25)
    assert rag_speed.throughput(reading) == pytest.approx(4 / 0.3)
    assert rag_speed.generation_speedup(reading) == pytest.approx(1 / 3)
    assert [100.0, 300.0, 900.0] == pytest.approx([rag_speed.generation_ms(one) for one in reading.each()])


def test_abstaining_is_told_from_answering():
    reading = records.UnanswerableReading(
        without=("Unanswerable.", "42 coins"), truths=(("red",), ("42 coins",)), having=("red", "I don't know")
    )

    assert rag_robustness.abstained(reading) == 0.5
    assert rag_robustness.abstained_wrongly(reading) == 0.5
    assert rag_robustness.unanswerable_f1(reading) == 0.5


@pytest.mark.parametrize("answer", ["It is not known to anyone but red", "42 coins", "North", "No", ""])
def test_an_answer_is_no_abstention_for_a_no_in_it(answer):
    assert not overlap.abstains(answer)


def test_a_metric_of_nothing_raises_instead_of_giving_a_number():
    with pytest.raises((ZeroDivisionError, MetricError)):
        all_metrics()["rag.f1"](AnswersReading(()))


def test_every_metric_of_the_specification_is_there():
    wanted = """context_sufficiency context_precision context_coverage retrieval_consistency retrieval_score
        chunks_retrieved context_length precision_at_1 precision_at_3 precision_at_5 precision_at_10 recall_at_1
        recall_at_3 recall_at_5 recall_at_10 f1_at_1 f1_at_3 f1_at_5 f1_at_10 mrr map ndcg_at_10 exact_match f1
        answer_relevance faithfulness rouge1 rouge2 rouge_l bertscore_f1 bleu retrieval_ms generation_ms
        no_rag_generation_ms throughput no_rag_throughput generation_speedup f1_improvement exact_match_improvement
        answer_length no_rag_answer_length"""

    assert [] == [name for name in wanted.split() if f"rag.{name}" not in all_metrics()]
    assert all(math.isfinite(m.rel) for m in all_metrics().values() if m.group == "rag")
