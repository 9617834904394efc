"""Answers: what transformers' own generation writes one prompt at a time, for many prompts at once."""

import pytest
import torch
from checkpoints import says, transformers_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from bench.errors import MetricError, OptionError
from bench.measure.answering import Answer, Sampling, answer, distribution
from bench.reference import tasks
from compression.checkpoints.base import byte_tokenizer

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SHARED = "The first seventy letters of these prompts are the same in each one of them: "
PROMPTS = [SHARED + "one", SHARED + "two, and more of it", "alone", SHARED, "Grüße aus 北京", "a", SHARED + "three"]


def alone(model, tokenizer, prompt, new_tokens):
    """What `generate` writes after one prompt: ids up to the end-of-sequence token, which is among them."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, use_cache=True
    )
    made = model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
    return made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [None, 16])
def test_greedy_answers_are_those_of_generate_one_prompt_at_a_time(family, window):
    sizes = {"vocab_size": 258, "max_position_embeddings": 256, "num_hidden_layers": 3, "eos_token_id": 257}
    if window and family.startswith("Qwen"):
        sizes |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    elif window and family == "MistralForCausalLM":
        sizes["sliding_window"] = window
    model, tokenizer = transformers_model(family, **sizes).eval(), byte_tokenizer()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # or a random model repeats one token

    found = answer(model, tokenizer, PROMPTS, new_tokens=24)

    expected = [alone(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    assert len({token for ids in expected for token in ids}) > 20
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected] == [each.text for each in found]
    assert [len(ids) for ids in expected] == [each.tokens for each in found]


def test_the_students_answers_are_those_of_generate_cut_at_the_stop(student):
    model, tokenizer = student
    kinds = ("arithmetic", "code", "no_rag")
    prompts = [tasks.prompt(item) for kind in kinds for item in tasks.items(kind, "test")[:4]]

    found = answer(model, tokenizer, prompts, new_tokens=40, stops=("\n",))

    expected = [tokenizer.decode(alone(model, tokenizer, prompt, 40)) for prompt in prompts]
    assert [text.partition("\n")[0].partition("</s>")[0] for text in expected] == [each.text for each in found]
    assert ["stop" if "\n" in text.partition("</s>")[0] else "end" if "</s>" in text else "length"
            for text in expected] == [each.reason for each in found]  # fmt: skip


@settings(max_examples=12)
@given(st.integers(0, 20), st.integers(1, 8))
def test_a_stop_is_found_wherever_the_tokens_cut_it(student, start, length):
    model, tokenizer = student
    prompt = tasks.prompt(tasks.items("code", "test")[0])
    whole = answer(model, tokenizer, [prompt], new_tokens=24)[0].text
    stop = whole[start : start + length]

    found = answer(model, tokenizer, [prompt], new_tokens=24, stops=("never said", stop))[0]

    assert whole.partition(stop)[0] == found.text
    assert found.reason == "stop"
    assert found.tokens <= 24


def test_a_special_token_given_as_a_stop_ends_the_answer_as_that_token(student):
    model, tokenizer = student
    prompt = tasks.prompt(tasks.items("arithmetic", "test")[0])
    said = answer(model, tokenizer, [prompt], new_tokens=1)[0].text
    token = tokenizer.encode(said)[0]
    marked = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>",
                             additional_special_tokens=[tokenizer.convert_ids_to_tokens(token)])  # fmt: skip

    assert [Answer("", 1, "end")] == answer(
        model, marked, [tokenizer.encode(prompt)], new_tokens=8, stops=(tokenizer.convert_ids_to_tokens(token),)
    )


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, top_p=0.95)])
def test_an_answer_does_not_depend_on_what_shares_its_batch(student, sampling):
    prompts = [tasks.prompt(item) for kind in ("arithmetic", "code") for item in tasks.items(kind, "test")[:6]]
    options = {"new_tokens": 24, "sampling": sampling, "seed": 3}

    few = answer(*student, prompts[:5], **options)

    assert few == answer(*student, prompts, **options)[:5]
    assert few == answer(*student, prompts[:5], **options)


class TestSampling:
    @given(
        st.lists(st.integers(-800, 800).map(lambda n: n / 100), min_size=4, max_size=12, unique=True),
        st.floats(0.1, 2), st.floats(0.05, 0.99), st.floats(0.5, 2), st.sets(st.integers(0, 3)),
    )  # fmt: skip
    def test_the_distribution_is_that_of_transformers_processors(self, logits, temperature, top_p, penalty, said):
        logits = torch.tensor([logits], dtype=torch.float64)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, list(said)] = True
        ids = torch.tensor([sorted(said)], dtype=torch.long).view(1, -1)
        scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        for processor in (TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)):
            scores = processor(ids, scores)

        found = distribution(logits, Sampling(temperature=temperature, top_p=top_p, repetition_penalty=penalty), seen)

        kept = scores.softmax(-1).sort().values
        if bool((kept.cumsum(-1) - (1 - top_p)).abs().min() > 1e-9):  # a tie with top_p itself is rounding's to decide
            torch.testing.assert_close(scores.softmax(-1), found, rtol=1e-9, atol=1e-12)

    def test_tokens_are_drawn_as_often_as_they_are_likely(self, student):
        model, tokenizer = student
        ids = tokenizer.encode(tasks.prompt(tasks.items("no_rag", "test")[0]))
        sampling = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.0)
        with torch.inference_mode():
            shares = distribution(model(torch.tensor([ids])).logits[:, -1], sampling)[0]

        said = [each.text for each in answer(model, tokenizer, [ids] * 2000, new_tokens=1, sampling=sampling)]

        likeliest = shares.topk(5)
        for share, token in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            count = said.count(tokenizer.decode([token]))
            assert count / 2000 == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)
        outside = {tokenizer.decode([n]) for n in (shares == 0).nonzero()[:, 0].tolist()}
        assert not outside & set(said) - {tokenizer.decode([n]) for n in shares.nonzero()[:, 0].tolist()}

    def test_another_seed_and_another_place_give_other_answers(self, student):
        prompt = tasks.prompt(tasks.items("code", "test")[0])
        options = {"new_tokens": 24, "sampling": Sampling(temperature=2.0, top_p=1.0, repetition_penalty=1.0)}

        one, two = answer(*student, [prompt] * 2, **options, seed=0)

        assert one != two
        assert one != answer(*student, [prompt], **options, seed=1)[0]

    def test_a_penalty_keeps_it_from_repeating(self, student):
        prompt = "one two three one two three one two three one two"
        plain = Sampling(temperature=0.01, top_p=1.0, repetition_penalty=1.0)
        said = student[1].encode(answer(*student, [prompt], new_tokens=30, sampling=plain)[0].text)
        held = Sampling(temperature=0.01, top_p=1.0, repetition_penalty=50.0)
        fresh = student[1].encode(answer(*student, [prompt], new_tokens=30, sampling=held)[0].text)

        assert len(set(fresh)) > len(set(said))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"temperature": 0},
                "temperature must be above 0 and finite, not 0; for greedy answers pass sampling=None",
            ),
            ({"temperature": float("nan")}, "temperature must be above 0 and finite, not nan"),
            ({"top_p": 1.5}, "top_p must be at most 1, not 1.5"),
            ({"top_p": 0}, "top_p must be above 0 and finite, not 0"),
            ({"repetition_penalty": -1}, "repetition_penalty must be above 0 and finite, not -1"),
        ],
    )
    def test_values_that_cannot_be_are_refused(self, values, message):
        with pytest.raises(OptionError, match=says(message)):
            Sampling(**values)


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompts", "options", "words"),
        [
            (["a", []], {}, ("prompt 1 is empty",)),
            (["a", [5] * 2047], {}, ("prompt 1 has 2047 tokens", "new_tokens=8", "2048 positions")),
            (["a"], {"new_tokens": 0}, ("new_tokens must be at least 1, not 0",)),
            (["a"], {"stops": ("\n", "")}, ("stops must not contain an empty string",)),
        ],
    )
    def test_what_cannot_be_answered_is_refused(self, student, prompts, options, words):
        with pytest.raises(OptionError, match=says(*words)):
            answer(*student, prompts, **{"new_tokens": 8, **options})

    def test_a_model_that_returns_nan_is_an_error_not_an_answer(self):
        config = AutoConfig.for_model("llama", vocab_size=258, hidden_size=16, intermediate_size=16,
                                      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
        model.lm_head.weight.data[3, 3] = float("nan")

        with pytest.raises(MetricError, match="logits are not finite after prompt 0"):
            answer(model, byte_tokenizer(), ["a"], new_tokens=2)

    def test_no_prompts_have_no_answers(self, student):
        assert [] == answer(*student, [], new_tokens=1)
