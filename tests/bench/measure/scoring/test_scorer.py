"""The scorer: lm-eval's own HFLM, one request at a time, is the reference."""

import pytest
import torch
from checkpoints import says, transformers_model
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from bench.errors import MetricError, OptionError
from bench.measure import reference_scores
from bench.measure.scoring.lm_eval import TOLERANCE, Scorer
from bench.measure.scoring.prefix_tree import Request, Tree, shares
from bench.reference import tasks, world
from compression.checkpoints.base import byte_tokenizer

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@pytest.fixture(scope="module")
def choices():
    """(context, continuation) of choices of one word and of many, with examples before them and without."""
    return [
        (tasks.prompt(item), choice)
        for kind, count in (("continuation", 6), ("facts_easy", 6), ("categories", 8))
        for item in tasks.items(kind, "test")[:count]
        for choice in item["choices"]
    ]


def instances(kind, arguments):
    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


def alone(model, request):
    """Log-likelihood of a request, and whether it is greedy, from one plain pass."""
    with torch.inference_mode():
        logs = model(torch.tensor([request.ids]), use_cache=False).logits[0, request.first - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(request.ids[request.first :])
    return float(logs[range(len(wanted)), wanted].sum()), bool((logs.argmax(-1) == wanted).all())


def maskless_model():
    """A model whose attention takes no mask: causal, and nothing else."""
    model = transformers_model("LlamaForCausalLM", vocab_size=258, max_position_embeddings=512).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5)  # or attention says next to nothing
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, forward=forward, attention_mask=None, **k: forward(
            *a, attention_mask=None, **k
        )
    return model


class TestLikelihoods:
    @pytest.mark.parametrize("options", [{}, {"rows": 1}, {"rows": 32}, {"tokens": 64}, {"tokens": 4096}], ids=str)
    def test_scores_and_greedy_flags_are_those_of_hflm(self, student, choices, options):
        requests = instances("loglikelihood", choices)
        expected = HFLM(pretrained=student[0], tokenizer=student[1], batch_size=1).loglikelihood(requests, True)

        found = Scorer(*student, **options).loglikelihood(requests)

        assert [greedy for _, greedy in expected] == [greedy for _, greedy in found]
        assert [value for value, _ in expected] == pytest.approx([value for value, _ in found], abs=TOLERANCE)
        assert {True, False} == {greedy for _, greedy in found}

    def test_what_requests_begin_with_is_read_once_and_a_choice_of_one_token_costs_nothing(self, student, monkeypatch):
        model, tokenizer = student
        item = tasks.items("categories", "test")[0]
        scorer = Scorer(*student)
        read = []
        forward = model.model.forward
        monkeypatch.setattr(model.model, "forward",
                            lambda *a, **k: read.append(k["input_ids"].numel()) or forward(*a, **k))  # fmt: skip

        scorer.loglikelihood(instances("loglikelihood", [(tasks.prompt(item), choice) for choice in item["choices"]]))

        assert len(tokenizer.encode(tasks.prompt(item))) == sum(read)

    @settings(max_examples=20)
    @given(
        st.lists(
            st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=10
        ), st.integers(1, 30), st.integers(1, 4), st.sampled_from(FAMILIES), st.data(),
    )  # fmt: skip
    def test_any_tree_of_sequences_is_scored_as_each_alone(self, sequences, tokens, rows, family, data):
        model = transformers_model(family).eval()
        requests = [Request(tuple(ids), data.draw(st.integers(1, len(ids) - 1))) for ids in sequences]

        found = Tree(model, tokens=tokens, rows=rows).score(requests)

        expected = [alone(model, request) for request in requests]
        assert [value for value, _ in expected] == pytest.approx([value for value, _ in found], abs=1e-4)
        assert [greedy for _, greedy in expected] == [greedy for _, greedy in found]

    @pytest.mark.parametrize(
        ("family", "sizes"),
        [
            ("MistralForCausalLM", {"sliding_window": 6}),
            ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ],
    )
    def test_sequences_beyond_a_sliding_window_are_scored_as_each_alone(self, family, sizes):
        model = transformers_model(family, **sizes).eval()
        requests = [Request((*range(10), end, end + 1), 4) for end in (3, 30)] + [Request((1, 2, 3), 1)]

        found = Tree(model, tokens=100).score(requests)

        assert [alone(model, one)[0] for one in requests] == pytest.approx([value for value, _ in found], abs=1e-4)

    def test_an_attention_that_ignores_the_mask_is_found_out_and_scored_right(self):
        model = maskless_model()
        requests = [Request((*range(20), end, 5), 18) for end in (30, 31, 32)]

        scorer = Scorer(model, byte_tokenizer())

        assert not scorer.shared
        expected = [alone(model, request)[0] for request in requests]
        assert expected == pytest.approx([value for value, _ in scorer._tree.score(requests)], abs=1e-4)
        assert expected != pytest.approx([v for v, _ in Tree(model, tokens=512).score(requests)], abs=1e-2)

    def test_an_eager_attention_shares_too(self):
        assert shares(transformers_model("LlamaForCausalLM").eval())
        model = transformers_model("LlamaForCausalLM").eval()
        model.set_attn_implementation("eager")
        requests = [Request((1, 2, 3, end), 2) for end in (4, 5)]

        assert shares(model)
        found = Tree(model, tokens=100).score(requests)
        assert [alone(model, one)[0] for one in requests] == pytest.approx([value for value, _ in found], abs=1e-4)

    @pytest.mark.parametrize("text", ["nf4", "magnitude(store=bitmask)", "structured", "rtn(bits=3)"])
    def test_compressed_models_score_alike_however_much_is_read_at_once(self, text, choices):
        model, tokenizer = reference_scores.load("student", text)
        requests = instances("loglikelihood", choices[::10])

        one, many = (Scorer(model, tokenizer, rows=rows) for rows in (1, 32))

        assert one.shared
        few = [value for value, _ in one.loglikelihood(requests)]
        assert few == pytest.approx([value for value, _ in many.loglikelihood(requests)], abs=0.05)

    def test_a_request_longer_than_the_context_loses_its_beginning_as_with_hflm(self):
        model, tokenizer = transformers_model("LlamaForCausalLM", vocab_size=258).eval(), byte_tokenizer()
        requests = instances("loglikelihood", [("long " * 20, "end"), ("short", "end")])

        scorer = Scorer(model, tokenizer)

        found = [value for value, _ in scorer.loglikelihood(requests)]
        expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests, True)
        assert [value for value, _ in expected] == pytest.approx(found, abs=TOLERANCE)
        assert 1 == scorer.truncated

    def test_a_text_with_nothing_before_it_is_scored_as_by_hflm(self, student):
        requests = instances("loglikelihood", [("", " one two")])

        expected = HFLM(pretrained=student[0], tokenizer=student[1], batch_size=1).loglikelihood(requests, True)

        found = Scorer(*student).loglikelihood([*requests, *instances("loglikelihood", [(" ", "one two")])])
        assert [expected[0][0]] * 2 == pytest.approx([value for value, _ in found], abs=TOLERANCE)

    def test_whole_texts_are_cut_in_windows_as_by_hflm(self, student):
        requests = instances("loglikelihood_rolling", [("\n\n".join(world.texts("test")[:n]),) for n in (2, 30)])
        assert len(student[1].encode(requests[1].args[0])) > 2048

        expected = HFLM(pretrained=student[0], tokenizer=student[1], batch_size=1).loglikelihood_rolling(requests, True)

        assert expected == pytest.approx(Scorer(*student).loglikelihood_rolling(requests), rel=1e-5)

    def test_a_model_that_returns_nan_has_no_score(self):
        model = transformers_model("LlamaForCausalLM").eval()
        model.lm_head.weight.data[3, 3] = float("nan")

        with pytest.raises(MetricError, match=says("log-likelihood of nan")):
            Tree(model, tokens=64).score([Request((1, 2, 3), 1)])


class TestAnswers:
    def test_answers_are_those_of_hflm(self, student):
        settings = {"until": ["\n"], "max_gen_toks": 32, "do_sample": False}
        asked = [(tasks.prompt(item), settings) for item in tasks.items("arithmetic", "test")[:4]]
        asked += [(tasks.prompt(item), settings | {"until": ["\n\n"]}) for item in tasks.items("code", "test")[:3]]
        requests = instances("generate_until", asked)

        expected = HFLM(pretrained=student[0], tokenizer=student[1], batch_size=1).generate_until(requests, True)

        assert expected == Scorer(*student).generate_until(requests)

    def test_a_model_without_masks_answers_as_generate_does_one_by_one(self):
        model, tokenizer = maskless_model(), byte_tokenizer()
        model.generation_config = GenerationConfig(eos_token_id=257)
        settings = {"until": [], "max_gen_toks": 8, "do_sample": False}
        requests = instances("generate_until", [(text, settings) for text in ("one", "another one", "a third")])

        expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(requests, True)

        assert expected == Scorer(model, tokenizer).generate_until(requests)

    def test_a_prompt_that_leaves_no_room_loses_its_beginning(self):
        model, tokenizer = transformers_model("LlamaForCausalLM", vocab_size=258).eval(), byte_tokenizer()
        model.generation_config = GenerationConfig()
        requests = instances("generate_until", [("long " * 20, {"until": [], "max_gen_toks": 10, "do_sample": False})])

        scorer = Scorer(model, tokenizer)

        assert HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(
            requests, True
        ) == scorer.generate_until(requests)
        assert 1 == scorer.truncated

    def test_repeated_requests_that_are_sampled_are_answered_differently(self, student):
        settings = {"until": ["\n"], "max_gen_toks": 24, "do_sample": True, "temperature": 2.0}
        prompt = tasks.prompt(tasks.items("code", "test")[0])

        said = Scorer(*student).generate_until(instances("generate_until", [(prompt, settings)] * 4))

        assert len(set(said)) > 1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"top_k": 5}, "generation settings top_k are unknown"),
            ({"max_gen_toks": 4096}, "generates 4096 new tokens"),
        ],
    )
    def test_settings_that_cannot_be_kept_are_refused(self, student, settings, message):
        with pytest.raises(OptionError, match=message):
            Scorer(*student).generate_until(instances("generate_until", [("a", {"until": ["\n"], **settings})]))
