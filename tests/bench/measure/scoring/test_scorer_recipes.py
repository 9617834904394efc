"""Scores of compressed models: the same bits in two runs, and alike however much is read at once."""

import pytest
import torch
from checkpoints import transformers_model
from lm_eval.api.instance import Instance

import compression
from bench.measure.scoring.lm_eval import TOLERANCE, TOLERANCE_16, Scorer
from compression.checkpoints.base import byte_tokenizer

RECIPES = ("fp16", "nf4", "gptq(group_size=32)", "awq(group_size=32)", "hqq(group_size=32)", "sparsegpt", "structured")
TEXTS = [("The price of the lamp is ", n) for n in ("9", "42 coins", "nothing at all")] + [
    ("The maker of the old harbour clock, who lived by the sea, was ", n) for n in ("Ann", "Bob the elder", "no one")
] + [(f"{n} and {n} make ", str(2 * n)) for n in range(6)]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder whose model says something different after every text."""
    folder = tmp_path_factory.mktemp("base")
    model = transformers_model(
        "LlamaForCausalLM", vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def compressed(base, recipe):
    calibration = torch.arange(128).view(4, 32) * 7 % 250
    needs = recipe.startswith(("gptq", "awq", "sparsegpt"))
    return compression.compress(str(base), recipe, calibration=calibration if needs else None).model


def scores(model, texts=TEXTS, **options):
    requests = [Instance("loglikelihood", {}, text, n) for n, text in enumerate(texts)]
    return [value for value, _ in Scorer(model, byte_tokenizer(), **options).loglikelihood(requests)]


@pytest.fixture(scope="module", params=RECIPES)
def twice(base, request):
    """Two models, each compressed from the folder."""
    return compressed(base, request.param), compressed(base, request.param)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, TOLERANCE_16), (torch.float32, TOLERANCE)], ids=["stored", "float32"]
)
def test_two_runs_give_the_same_bits_and_one_sequence_at_a_time_scores_like_32(twice, dtype, tolerance):
    first, again = (model.to(dtype) for model in twice)

    one, many = (scores(first, rows=rows) for rows in (1, 32))

    assert one == scores(again, rows=1)
    assert many == scores(again, rows=32)
    assert one == pytest.approx(many, abs=tolerance)


def test_the_tolerance_is_far_below_what_a_letter_changes(base):
    model = compressed(base, "fp16").float()
    changed = [(context[1:], continuation) for context, continuation in TEXTS]

    differences = [abs(a - b) for a, b in zip(scores(model), scores(model, changed), strict=True)]

    assert min(differences) > 10 * TOLERANCE
