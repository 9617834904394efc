"""Clarity and likelihood of answers, and the answering run: hand-worked figures, laws, the embedded reference."""

import json
import math
import os
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import says, transformers_model
from hypothesis import given
from hypothesis import strategies as st

from bench.data.collections.readers import embedded, open_collection
from bench.data.scripts import has_english_letters
from bench.errors import DataError, NotAvailable, OptionError
from bench.measure.judge import readings
from bench.measure.judge.answers import TEMPLATE, Answered, Asked, answers_of, check, instructions, questions_of
from bench.measure.judge.clarity import (
    Clarity,
    SmallModel,
    clarity,
    coherence_by_encoder,
    coherence_by_words,
    cosine,
    fluency,
    fluency_paper,
    readability,
    reading_ease,
    sentences,
    syllables,
    tf_idf,
    words,
)
from bench.measure.judge.likelihood import likelihoods
from compression.errors import install_command


def answered(text, context="The fox is red. It lives in a den."):
    asked = Asked(question="Which?", context=context, truths=("red",), prompt="Q: Which?\nA:", instructions=())
    return Answered(asked, text)


# --- readability ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words_", "sentences_", "syllables_"),
    [
        ("The cat sat on the mat.", 6, 1, 6),
        ("It rains. The river rises!", 5, 2, 7),  # it rains the ri-ver ri-ses
        ("Beautiful animals live in this country, and nobody hunts them.", 10, 1, 17),
        ("The price is 42 coins", 5, 1, 5),
    ],
)
def test_flesch_reading_ease_is_that_worked_by_hand(text, words_, sentences_, syllables_):
    by_hand = 206.835 - 1.015 * words_ / sentences_ - 84.6 * syllables_ / words_

    assert (words_, sentences_, syllables_) == (len(words(text)), sentences(text), sum(map(syllables, words(text))))
    assert by_hand == pytest.approx(reading_ease(text))
    assert min(1, max(0, by_hand / 100)) == pytest.approx(readability(text))


def test_syllables_by_rule_are_right_for_nine_words_of_ten():
    """Counted by hand. Rules miss what only a dictionary knows: "rhythm", "naive", "poem"."""
    by_hand = {
        1: "the cat mat jumped makes time stone through bridge knight eyes rhyme school asked house drives thought "
        "blue",
        2: "table river rises wanted open science water city little apple began question nation houses being poem "
        "naive something rhythm carried village money quiet people handle paper gentle mirror copper fountain",
        3: "beautiful animal elephant library computer important forever family another however remember government "
        "radio industry",
        4: "information education television interesting january experience material category territory",
    }
    right = [count == syllables(word) for count, listed in by_hand.items() for word in listed.split()]

    assert sum(right) / len(right) >= 0.9


@pytest.mark.parametrize("text", ["", "...", "?! -"])
def test_an_answer_without_a_word_has_no_clarity(text):
    assert [Clarity(0, 0, 0, 0)] == clarity([answered(text)], lambda texts: 1 / 0, lambda answers: 1 / 0)


@given(st.text(max_size=60))
def test_readability_is_a_share_of_every_text_with_a_word(text):
    if words(text):
        assert has_english_letters(text) == (readability(text) is not None)
        assert 0 <= (readability(text) or 0) <= 1


@pytest.fixture(scope="module")
def small_model():
    return SmallModel()


@pytest.fixture(scope="module")
def teacher(small_model):
    """Model and tokenizer."""
    return small_model.scorer.model, small_model.scorer.tokenizer


# --- fluency ----------------------------------------------------------------------------------------------------------


@given(st.floats(1, 1e30), st.floats(1, 1e30))
def test_fluency_falls_with_perplexity_and_the_printed_formula_rises(one, other):
    low, high = sorted((one, other))

    assert 1 >= fluency(low) >= fluency(high) > 0
    assert 0 <= fluency_paper(low) <= fluency_paper(high) < 1


def test_the_printed_formula_gives_the_figures_that_show_it_upside_down():
    assert [0.64, 0.85] == [round(fluency_paper(perplexity), 2) for perplexity in (3.4, 53.37)]


def test_perplexity_of_an_answer_is_that_of_its_tokens_behind_the_start_of_a_text(teacher, small_model):
    import torch

    model, tokenizer = teacher
    text = "The price of the lamp is 42 coins."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    with torch.inference_mode():
        logits = model(torch.tensor([[start, *ids]])).logits[0].double().log_softmax(-1)
    mean = statistics.fmean(float(logits[n, token]) for n, token in enumerate(ids))

    assert math.exp(-mean) == pytest.approx(small_model.perplexities([text])[0], rel=1e-3)


def test_the_small_model_holds_a_sentence_of_its_language_for_more_fluent_than_its_words_turned_round(small_model):
    told = "The home of the Iron Fountain is Almeda. The weight of the Iron Fountain is 89 grams."
    straight, turned = small_model.perplexities([told, " ".join(reversed(told.split()))])

    assert straight < turned


def test_another_small_model_is_opened_by_transformers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from compression.checkpoints.base import byte_tokenizer

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(
        tmp_path
    )
    byte_tokenizer().save_pretrained(tmp_path)
    [perplexity] = SmallModel(str(tmp_path)).perplexities(["red"])

    assert 100 < perplexity < 1000  # of random weights: about the size of the vocabulary


def test_a_small_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OptionError, match=says("--fluency-model", "reference-teacher")):
        SmallModel(str(tmp_path))


# --- coherence --------------------------------------------------------------------------------------------------------


def test_coherence_by_words_is_the_cosine_worked_by_hand():
    answers = [answered("red fox", "red fox"), answered("red", "red owl"), answered("blue", "red owl")]
    # of the two contexts both have "red", one each has "fox" and "owl": weights 1 and 1 + ln(3 / 2)
    rare = 1 + math.log(3 / 2)

    assert [1.0, 1 / math.hypot(1, rare), 0.0] == pytest.approx(coherence_by_words(answers))


vectors = st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10), max_size=4)


@given(vectors, vectors, st.floats(0.5, 2))
def test_a_cosine_is_symmetric_within_bounds_and_blind_to_length(one, other, scale):
    value = cosine(one, other)

    assert 0 <= value <= 1 + 1e-9
    assert value == pytest.approx(cosine(other, one))
    assert value == pytest.approx(cosine({word: scale * weight for word, weight in one.items()}, other))


def test_a_word_that_every_text_has_weighs_least():
    weights = tf_idf(["the fox", "the owl", "the hen"])("the fox")

    assert weights["the"] < weights["fox"]


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(teacher):
    return questions_of(embedded("validation"), teacher[1], count=16)


def test_the_answering_run_is_answered_rightly_by_the_reference_and_comes_again(student, questions):
    model, tokenizer = student
    said = answers_of(model, tokenizer, questions, form="reference", new_tokens=8)

    assert sum(each.text == each.asked.truths[0] for each in said) >= 14
    assert said == answers_of(model, tokenizer, questions, form="reference", new_tokens=8)


def test_right_answers_are_likelier_than_those_to_other_questions_and_than_none(teacher, questions):
    right = [Answered(each, each.truths[0]) for each in questions]
    wrong = [Answered(one, next(o.truths[0] for o in questions[n:] + questions[:n] if o.truths[0] != one.truths[0]))
             for n, one in enumerate(questions)]  # fmt: skip
    empty = [Answered(each, "") for each in questions]
    first, second, third = (likelihoods(*teacher, answers, form="reference") for answers in (right, wrong, empty))

    assert sum(a > b for a, b in zip(first, second, strict=True)) >= 15
    assert sum(a > c for a, c in zip(first, third, strict=True)) >= 15
    assert all(0 <= value <= 1 for value in (*first, *second, *third))


def test_scores_are_kept_by_question(questions):
    answers = [Answered(each, each.truths[0]) for each in questions]
    scores = readings.clarity(answers, lambda texts: [8.0] * len(texts), coherence_by_words)

    assert 0.25 == scores.mean("fluency")
    assert scores.mean("clarity") == pytest.approx(
        (0.25 + scores.mean("coherence") + scores.mean("readability")) / 3
    )  # fmt: skip
    assert scores.items["judge.clarity"].mean == pytest.approx(scores.mean("clarity"))
    assert 16 == len(scores.items["judge.clarity"])


# --- questions --------------------------------------------------------------------------------------------------------


SQUAD = {"data": [{"paragraphs": [
    {"context": "The fox is red {and} quick.", "qas": [
        {"id": "1", "question": "Which colour has the fox?", "answers": [{"text": "red", "answer_start": 11}]},
        {"id": "2", "question": "Where does it live?", "answers": [], "is_impossible": True}]},
    {"context": "The owl is grey.", "qas": [
        {"id": "3", "question": "Which colour has the owl?", "answers": [{"text": "grey", "answer_start": 11}]}]},
]}]}  # fmt: skip


@pytest.fixture
def squad(tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD))
    return open_collection(tmp_path / "dev.json")


def test_a_question_is_asked_with_its_own_paragraph_and_the_instructions_of_the_template(squad, teacher):
    first, second = sorted(questions_of(squad, teacher[1]), key=lambda asked: asked.question)

    assert ("The fox is red {and} quick.", "The owl is grey.") == (first.context, second.context)
    assert "The fox is red {and} quick." in first.prompt
    assert first.prompt.endswith("Question: Which colour has the fox?\nAnswer:")
    assert first.instructions == instructions(TEMPLATE)
    assert 3 == len(first.instructions)
    assert all(f"- {each}\n" in first.prompt for each in first.instructions)


def test_a_paragraph_that_is_too_long_is_refused_with_its_question(squad, teacher):
    with pytest.raises(DataError, match=says("of dev with its paragraph", "200 are to be answered", "60 positions")):
        questions_of(squad, teacher[1], positions=60)


def test_questions_without_a_paragraph_are_said_to_be_missing(squad):
    bare = replace(squad, questions=tuple(replace(question, gains={}) for question in squad.questions))
    with pytest.raises(NotAvailable, match=says("dev", "SQuAD file", "--dataset-path")):
        check(bare)


def test_a_base_of_somebody_else_is_asked_by_the_template(squad, tmp_path):
    from compression.checkpoints.base import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = transformers_model("LlamaForCausalLM", vocab_size=300, max_position_embeddings=600)
    asked = questions_of(squad, tokenizer, new_tokens=4, positions=600)
    said = answers_of(model.eval(), tokenizer, asked, form="plain", new_tokens=4, decoding="greedy")

    assert ["1", "3"] == [q.id for q in squad.questions if q.text in {each.asked.question for each in said}]


def test_squad_files_as_published_are_read_a_thousand_questions_of_them():
    if not os.environ.get("BENCH_DATA"):
        pytest.skip("BENCH_DATA is not set: the folder with xquad-en")
    from compression.checkpoints.base import byte_tokenizer

    [path] = (Path(os.environ["BENCH_DATA"]) / "xquad-en").glob("*.json")
    asked = questions_of(open_collection(path), byte_tokenizer())

    assert 1000 == len(asked)
    assert all(each.truths[0] in each.context and each.context in each.prompt for each in asked)


@pytest.mark.filterwarnings("ignore")
def test_coherence_by_an_encoder_is_the_cosine_of_its_embeddings(tmp_path):
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason=f"sentence-transformers is not installed: {install_command('rag')}"
    )
    import numpy as np
    from sentence_transformers.models import StaticEmbedding

    from compression.checkpoints.base import byte_tokenizer

    module = StaticEmbedding(byte_tokenizer().backend_tokenizer, embedding_dim=8)
    sentence_transformers.SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(tmp_path))
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    said, about = encoder.encode(["It is red.", "The fox is red. It lives in a den."])
    by_hand = float(said @ about / np.linalg.norm(said) / np.linalg.norm(about))

    [found] = coherence_by_encoder(str(tmp_path), "cpu")([answered("It is red.")])

    assert max(0, by_hand) == pytest.approx(found, abs=1e-5)


def test_an_encoder_that_cannot_be_had_is_refused_by_its_option(tmp_path):
    with pytest.raises(OptionError, match="--coherence-encoder"):
        coherence_by_encoder(str(tmp_path), "cpu")
