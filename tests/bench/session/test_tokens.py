"""From text to ids: the same for every tokenizer, whatever it puts around a text, merges or strips."""

import re

import pytest
import torch
from checkpoints import says
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from wordings import LETTERS, TEMPLATE, texts, tiny, tokenizer_of, tokenizers, wide_texts, words_tokenizer

from bench.errors import DataError
from bench.measure.judge.answers import prompt as judged_prompt
from bench.measure.judge.local import LocalJudge
from bench.measure.rag.prompts import prompt as rag_prompt
from bench.measure.scoring.lm_eval import Scorer
from bench.session.options import Options
from compression.checkpoints.tokens import check_template, conversation, encode, encode_parts, tokens_of
from compression.errors import CheckpointError
from compression.training.downstream import Downstream


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(tokenizers(), wide_texts)
def test_a_text_has_what_its_tokenizer_puts_before_it_and_nothing_behind_it(tokenizer, text):
    ids, spans = tokens_of(tokenizer, text)

    before = tokenizer("a")["input_ids"][: -len(bare(tokenizer, "a"))] if tokenizer("a")["input_ids"][0] == 0 else []
    assert before[:1] + bare(tokenizer, text) == ids
    assert bare(tokenizer, text) == encode(tokenizer, text, special=False)
    assert len(spans) == len(ids)
    assert 1 not in ids


@given(tokenizers(), texts, st.booleans())
def test_a_conversation_has_the_ids_of_its_template_and_one_bos_where_that_begins_with_one(tokenizer, text, prompt):
    asked = [{"role": "user", "content": text}]

    ids = encode(tokenizer, conversation(tokenizer, asked, add_generation_prompt=prompt))

    assert tokenizer.apply_chat_template(asked, add_generation_prompt=prompt)["input_ids"] == ids
    assert tokenizer.chat_template.startswith("<s>") == ids.count(0)


@given(tokenizers(), texts)
def test_a_plain_text_that_begins_with_bos_gets_no_second_one(tokenizer, text):
    assert 1 == encode(tokenizer, "<s>" + text).count(0)
    assert bare(tokenizer, "<s>" + text) == encode(tokenizer, "<s>" + text)


@given(tokenizers(), st.lists(texts, min_size=1, max_size=4))
def test_texts_that_follow_each_other_are_one_text_cut_behind_the_tokens_that_end_in_each(tokenizer, parts):
    split = encode_parts(tokenizer, parts)

    whole = tokens_of(tokenizer, "".join(parts))
    assert whole.ids == [token for part in split for token in part]
    borders = [len("".join(parts[: n + 1])) for n in range(len(parts) - 1)]
    ends = [end for _, end in whole.spans]
    for number, border in enumerate(borders):
        first = sum(map(len, split[: number + 1]))
        assert all(end <= border for end in ends[:first])
        assert all(end > border for end in ends[first:])


class Slow:
    """A tokenizer that cannot say which characters a token stands for."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer, self.bos_token_id = tokenizer, tokenizer.bos_token_id

    def __call__(self, text, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self.tokenizer(text, **options)


@given(tokenizers(merges=()), texts, texts)
def test_without_offsets_the_cut_is_where_the_prompt_alone_goes_another_way(tokenizer, prompt, answer):
    slow = Slow(tokenizer)

    assume(prompt)
    assert encode_parts(tokenizer, [prompt, answer]) == encode_parts(slow, [prompt, answer])
    assert tokens_of(slow, prompt).spans is None


def test_a_merge_over_the_border_belongs_to_the_answer_that_it_ends_in():
    tokenizer = tokenizer_of(merges=[(":", " "), (" ", "b")])

    assert [["<s>", "a"], [":\u0120"]] == [
        tokenizer.convert_ids_to_tokens(part) for part in encode_parts(tokenizer, ["a:", " "])
    ]


def test_a_tokenizer_that_puts_tokens_into_a_text_is_refused():
    class Odd:
        bos_token_id, name_or_path = 0, "odd"

        def __call__(self, text, add_special_tokens=True, **options):
            return {"input_ids": [5, 0, 6] if add_special_tokens else [5, 6]}

    with pytest.raises(CheckpointError, match=says("'odd' makes [5, 0, 6]", "before and behind a text alone")):
        encode(Odd(), "text")


class TestTraining:
    @settings(max_examples=40)
    @given(tokenizers(), st.lists(st.tuples(texts, st.text(LETTERS, min_size=1, max_size=5)), min_size=1, max_size=5))
    def test_examples_are_learnt_as_the_one_text_that_a_model_is_asked(self, tokenizer, pairs):
        task = Downstream("mine", lambda: pairs)

        found = task.texts(tokenizer, samples=None, length=32, seed=0)

        texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(found.ids, found.mask, strict=True)]
        for ids, mask, learn, text in zip(found.ids, found.mask, found.learn, texts, strict=True):
            assert bare(tokenizer, text) == ids[mask].tolist()
            assert not (learn & ~mask).any()
        ended = [prompt + answer + ("" if answer[-1].isspace() else "\n\n") for prompt, answer in pairs]
        assert sum(map(len, ended)) == sum(map(len, texts))


class TestScores:
    model = tiny()

    @settings(max_examples=40)
    @given(tokenizers(), texts, texts.filter(str.strip))
    def test_a_choice_has_the_likelihood_of_its_tokens_in_the_text_that_it_makes(self, tokenizer, prompt, choice):
        [(found, _)] = Scorer(self.model, tokenizer).loglikelihood([Instance("l", {}, (prompt, choice), 0)])

        ids, spans = tokens_of(tokenizer, prompt + choice, special=bool(prompt.strip()))
        border = len(prompt.rstrip())
        first = next((at for at, (_, end) in enumerate(spans) if end > border))
        if first == 0:
            ids, first = [0, *ids], 1
        with torch.inference_mode():
            logs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(logs[at - 1, ids[at]]) for at in range(first, len(ids)))
        assert expected == pytest.approx(found, abs=1e-3)

    @pytest.mark.parametrize("size", [255, 256, 257, 600])
    def test_a_choice_that_does_not_fit_into_the_context_is_refused_by_name(self, size):
        scorer, choice = Scorer(self.model, tokenizer_of()), "b" * size
        if size <= 256:
            [(value, _)] = scorer.loglikelihood([Instance("l", {}, ("a" * 9, choice), 0)])
            assert value < 0
            assert 1 == scorer.truncated
            return
        with pytest.raises(DataError, match=says("'bbb", f"{size} tokens to be scored", "1 to 256")):
            scorer.loglikelihood([Instance("l", {}, ("a", choice), 0)])

    def test_a_choice_without_tokens_is_refused(self):
        with pytest.raises(DataError, match=says("'' has 0 tokens to be scored")):
            Scorer(self.model, tokenizer_of()).loglikelihood([Instance("l", {}, ("a", ""), 0)])

    def test_a_tokenizer_of_another_model_is_refused_in_words(self):
        with pytest.raises(CheckpointError, match=says("has token", "the model knows 64", "not of one checkpoint")):
            Scorer(tiny(vocab_size=64), tokenizer_of()).loglikelihood([Instance("l", {}, ("a", " b"), 0)])

    def test_a_tokenizer_without_special_tokens_scores_and_answers_and_says_where_it_cannot(self):
        scorer = Scorer(self.model, tokenizer_of(named=False, begins=False))

        assert scorer.loglikelihood([Instance("l", {}, ("a", " b"), 0)])[0][0] < 0
        asked = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
        assert 1 == len(scorer.generate_until([Instance("g", {}, ("a", asked), 0)]))
        for kind, arguments in (("loglikelihood", ("", "b")), ("loglikelihood_rolling", ("ab",))):
            with pytest.raises(DataError, match=says("neither a beginning", "eos_token")):
                getattr(scorer, kind)([Instance(kind, {}, arguments, 0)])


def prompts_of(tokenizer):
    """A prompt of every kind in the tokenizer's chat template, by what builds it."""
    judge = LocalJudge.__new__(LocalJudge)
    judge.opened = (None, tokenizer)
    return {
        "rag": rag_prompt("Where?", ["There."], "plain", tokenizer),
        "bare": rag_prompt("Where?", [], "plain", tokenizer),
        "judged": judged_prompt("Where?", "There.", "plain", tokenizer),
        "local judge": judge._templated("Which?"),
        "tasks": Scorer(TestScores.model, tokenizer).apply_chat_template([{"role": "user", "content": "Which?"}]),
    }


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_whoever_builds_a_prompt_it_has_the_bos_of_its_template(begins, template):
    tokenizer = tokenizer_of(begins=begins, template=template, ends=True)
    scorer = Scorer(TestScores.model, tokenizer)
    for prompt in prompts_of(tokenizer).values():
        [content] = re.findall(r"\[(.*)\]", prompt, re.DOTALL)
        asked = [{"role": "user", "content": content}]
        expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]

        assert expected == scorer.tok_encode(prompt) == encode(tokenizer, prompt)
        assert expected == scorer._encode_pair(prompt, " b")[0]
        assert template == expected.count(0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, None),
        ({"enable_thinking": False}, None),
        ({"enable_thinking": True}, '{"enable_thinking": true}'),
        ({"enable_thinking": False, "depth": 2}, '{"depth": 2}'),
    ],
)
def test_arguments_that_are_not_the_usual_ones_are_in_the_key_of_rows(arguments, text):
    assert text == Options(template=arguments).template_text


class TestTemplates:
    def test_thinking_is_off_unless_it_is_asked_for(self):
        tokenizer = words_tokenizer("<eos>", "a")
        tokenizer.chat_template = "{{ enable_thinking }} {{ depth }}"

        asked = [{"role": "user", "content": "a"}]
        assert "False " == conversation(tokenizer, asked)
        assert "True 2" == conversation(tokenizer, asked, {"enable_thinking": True, "depth": 2})

    def test_arguments_that_a_template_does_not_read_are_refused_with_those_that_it_reads(self):
        tokenizer = words_tokenizer("<eos>", "a")
        with pytest.raises(CheckpointError, match=says("(depth)", "no chat template")):
            check_template(tokenizer, {"depth": 1})
        tokenizer.chat_template = TEMPLATE + "{% generation %}{{ depth }}{% endgeneration %}{% if style %}{% endif %}"

        check_template(tokenizer, {"depth": 1})
        with pytest.raises(CheckpointError, match=says("does not read deep; it reads depth, style")):
            check_template(tokenizer, {"deep": 1})
