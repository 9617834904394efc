"""Measures of texts beyond ASCII English: right in any script and normal form, or refused by name."""

# ruff: noqa: RUF001

import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rag_replies import said

from bench.data.collections.chunking import Chunking, cut
from bench.data.scripts import has_english_letters, is_english, pieces, search_terms, sentence_ends, token_spans, words
from bench.errors import NotAvailable
from bench.measure.judge import readings
from bench.measure.judge.answers import Answered, Asked
from bench.measure.judge.clarity import coherence_by_words, readability
from bench.measure.judge.clarity import words as clear_words
from bench.measure.rag import overlap
from bench.measure.rag.records import AnswersReading, UnanswerableReading
from bench.measure.rag.retrieval import BM25, terms
from bench.metrics import all_metrics, rag_answers, rag_robustness

OVERLAP = ("f1", "exact_match", "squad_f1", "squad_exact_match", "contains", "faithfulness", "faithfulness_normalised",
           "answer_relevance", "rouge1", "rouge_l", "bleu")  # fmt: skip
SAMPLES = {
    "Russian": "Это столица России, город Москва.",
    "Greek": "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.",
    "Arabic": "القاهرة هي عاصمة مصر.",
    "Hindi": "दिल्ली भारत की राजधानी है।",
    "Chinese": "北京是中国的首都。",
    "Japanese": "東京は日本の首都です。",
    "Thai": "กรุงเทพเป็นเมืองหลวงของประเทศไทย",
    "Korean": "서울은 대한민국의 수도이다.",
    "German": "Die Straße führt über Köln nach Münster.",
    "Vietnamese": "Hà Nội là thủ đô của Việt Nam.",
    "French": "L'été, la forêt est très sèche.",
}
scripts = st.sampled_from("".join(SAMPLES.values()) + " .,!?-'’«»éß0123४ＡⅧ²𝟘ﬁ")
texts = st.text(max_size=12) | st.lists(scripts, max_size=16).map("".join)


def scores(answer, truth):
    reading = AnswersReading((said(answer, question=truth, truths=[truth], context=truth),))
    return {name: getattr(rag_answers, name)(reading) for name in OVERLAP}


def has_a_word(text):
    return any(unicodedata.category(letter)[0] in "LN" for letter in text)


@given(texts)
def test_a_text_with_a_letter_or_a_digit_equals_itself_under_every_measure(text):
    assume(has_a_word(text))

    assert dict.fromkeys(OVERLAP, 1) == pytest.approx(scores(text, text))
    assert overlap.sufficient(text, text, 1.0)


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_sentences_of_many_scripts_share_all_with_themselves_and_little_with_others(text):
    assert dict.fromkeys(OVERLAP, 1) == pytest.approx(scores(text, text))
    assert 1 == rag_answers.rouge2(AnswersReading((said(text, truths=[text]),)))
    for other in set(SAMPLES.values()) - {text}:
        assert max(scores(text, other).values()) < 0.6


@given(texts, texts)
def test_how_a_letter_was_typed_changes_no_measure(one, other):
    def of(form):
        return [unicodedata.normalize(form, text) for text in (one, other)]

    assert scores(*of("NFC")) == scores(*of("NFD"))
    assert overlap.sufficient(*of("NFC"), 0.8) == overlap.sufficient(*of("NFD"), 0.8)
    for split in (words, clear_words, pieces, search_terms, terms, overlap.squad_tokens):
        assert split(of("NFC")[0]) == split(of("NFD")[0])
    assert len(token_spans(of("NFC")[0])) == len(token_spans(of("NFD")[0]))


def test_two_forms_of_a_letter_are_one_where_a_mark_is_compared_with_its_letter():
    assert dict.fromkeys(OVERLAP, 1) == pytest.approx(scores("cafe\u0301", "caf\u00e9"))
    assert overlap.holds("das Cafe\u0301 dort", "CAF\u00c9")
    assert not overlap.holds("das Cafe\u0301 dort", "Cafe")


@given(st.text(st.characters(max_codepoint=127), max_size=30), st.text(st.characters(max_codepoint=127), max_size=30))
def test_of_ascii_texts_the_values_are_those_of_the_published_scripts(answer, truth):
    import re
    import string
    from collections import Counter

    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_bleu

    def squad(text):  # SQuAD's evaluation script, step by step
        text = "".join(each for each in text.lower() if each not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    reading = AnswersReading((said(answer, truths=[truth]),))
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(truth, answer)
    common = sum((Counter(squad(answer)) & Counter(squad(truth))).values())
    f1 = 2 * common / (len(squad(answer)) + len(squad(truth))) if common else float(squad(answer) == squad(truth))

    for name, ours in (("rouge1", rag_answers.rouge1), ("rouge2", rag_answers.rouge2), ("rougeL", rag_answers.rouge_l)):
        assert theirs[name].fmeasure == ours(reading)
    assert sentence_bleu(answer, [truth]).score / 100 == rag_answers.bleu(reading)
    assert f1 == pytest.approx(rag_answers.squad_f1(reading))
    assert (answer.lower().split() == truth.lower().split()) == rag_answers.exact_match(reading)


def test_in_a_script_without_spaces_f1_is_by_letter():
    reading = AnswersReading((said("東京都", truths=["東京。"]),))

    assert 2 * 2 / (3 + 2) == pytest.approx(rag_answers.squad_f1(reading))
    assert ["กุ", "ง"] == words("กุง")  # a letter with the mark on it is one


def test_marks_around_an_answer_in_another_script_are_punctuation():
    assert overlap.squad_exact("«Москва».", ["москва"])
    assert overlap.squad_exact("「東京」。", ["東京"])


@pytest.mark.parametrize(("answer", "held"), [
    ("The price is 42 coins, I think.", True), ("42 coins", True), ("Coins: 42", False), ("It is 142 coins.", False),
    ("", False), ("Столица — Москва.", False),
])  # fmt: skip
def test_an_answer_contains_a_truth_where_its_words_stand_in_it_in_order(answer, held):
    assert held == rag_answers.contains(AnswersReading((said(answer, truths=["42 coins", "42 grams"]),)))


def test_contains_takes_any_truth_and_its_items_are_binary():
    reading = AnswersReading((said("It may be red.", truths=["grey", "red"]), said("No.", truths=["red"])))

    assert 0.5 == rag_answers.contains(reading)
    assert ("binary", [0.0, 1.0]) == (reading.items["rag.contains"].kind, sorted(reading.items["rag.contains"].values))


# --- search and chunks ------------------------------------------------------------------------------------------------


def test_every_script_is_searched():
    found = BM25(list(SAMPLES.values()))

    for place, text in enumerate(SAMPLES.values()):
        assert place == found.search(unicodedata.normalize("NFD", text), 1)[0].chunk
    assert [] == BM25([SAMPLES["Chinese"]]).search("京北", 1)  # the letters, but not in this order


@pytest.mark.parametrize(("text", "count"), [
    ("Это так. И это тоже! Да?", 3), ("北京在北方。上海在南方！好吗？", 3), ("यह है। वह है।", 2),
    ("Één huis. Être ici.", 2),
    ("هذا. ذلك؟ نعم.", 3), ("“Yes.” “No.”", 2), ("Version 3.5 is out. E.g. this.", 2),
    (unicodedata.normalize("NFD", "Ça va. Élan là. Ö."), 3),
])  # fmt: skip
def test_sentences_end_in_other_scripts_too(text, count):
    chunks = cut("d", text, Chunking(by="sentences", size=1, overlap=0))

    assert count == len(chunks)
    assert "".join(text.split()) == "".join("".join(chunk.text.split()) for chunk in chunks)


def test_signs_without_end_are_cut_in_time_that_grows_as_their_length():
    for text in (". " * 50_000, "." + " " * 100_000 + "x", "a." + '"' * 100_000, "\n " * 50_000, "。" * 100_000):
        assert len(sentence_ends(text)) <= len(text)


# --- what is English, and what is refused -----------------------------------------------------------------------------

ENGLISH = "The fox is red, and it lives in a den that is by the river. They will not see it there."


def test_english_is_told_from_languages_that_look_like_it():
    dutch = "De regering heeft in de afgelopen jaren veel geld uitgegeven, en het is niet duidelijk of dat zo blijft."
    norwegian = "Regjeringen har brukt mye penger for at det skal bli bedre, og det er for tidlig å si om det var nok."

    assert is_english([ENGLISH])
    for text in (dutch, norwegian, *SAMPLES.values(), "", "42 17"):
        assert not is_english([text])
    assert (
        has_english_letters("42!") and has_english_letters("Café society was there") and not has_english_letters("кот")
    )


def clarity(answers, context, perplexities=lambda texts: [8.0] * len(texts)):
    asked = [Asked(question="?", context=context, truths=("red",), prompt=f"{n}", instructions=())
             for n in range(len(answers))]  # fmt: skip
    return readings.clarity([*map(Answered, asked, answers)], perplexities, coherence_by_words)


def test_readability_of_another_language_is_refused_by_name_and_what_knows_it_is_not():
    found = clarity([SAMPLES["Russian"]], SAMPLES["Russian"])

    for name in ("readability", "clarity", "clarity_paper"):
        with pytest.raises(NotAvailable, match=r"Flesch.*not in English"):
            all_metrics()[f"judge.{name}"](found)
    assert (0.25, 1) == (found.mean("fluency"), pytest.approx(found.mean("coherence")))
    assert {"judge.fluency", "judge.fluency_paper", "judge.coherence"} == set(found.items)
    assert found.remark is None


def test_fluency_without_a_model_that_knows_the_language_is_refused_and_the_rest_is_not():
    found = clarity(["The fox is red."], ENGLISH, None)

    for name in ("fluency", "fluency_paper", "clarity", "clarity_paper"):
        with pytest.raises(NotAvailable, match="--fluency-model"):
            all_metrics()[f"judge.{name}"](found)
    assert found.mean("readability") > 0 and found.mean("coherence") > 0


def test_an_answer_in_other_letters_among_english_ones_has_no_readability_and_is_counted():
    found = clarity(["The fox is red.", "Лиса рыжая."], ENGLISH)

    assert found.by["readability"][1] is None
    assert found.remark.startswith("up to 1 of 2 questions are left out")
    assert readability("The fox is red.") == found.mean("readability")


def test_abstention_is_refused_where_its_phrases_are_not_of_the_language():
    reading = UnanswerableReading(without=("нет",), truths=((),), having=("да",), foreign="xquad.ru")

    for name in ("abstained", "abstained_wrongly"):
        with pytest.raises(NotAvailable, match=r"English phrases.*xquad.ru"):
            all_metrics()[f"rag.{name}"](reading)
    assert 0 == rag_robustness.unanswerable_f1(reading)
    assert overlap.abstains("I don\u2019t know.")
