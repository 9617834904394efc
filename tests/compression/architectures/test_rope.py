"""Rotary positions that look at the longest position of a pass: every text gets what it gets alone."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig
from wordings import tiny

from bench.data.sources import open_data
from bench.measure import rope as _rope
from bench.measure.answering import answer
from bench.measure.decode_step import lean_step
from bench.measure.perplexity import perplexity
from bench.measure.perplexity_windows import PerplexityProtocol
from bench.measure.scoring.prefix_tree import Request, Tree
from compression.checkpoints.base import byte_tokenizer

BORDER = 24  # tokens up to which no text changes another
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0 + n for n in
        range(8)], "factor": 8.0, "original_max_position_embeddings": BORDER}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {
    "longrope": tiny(rope_parameters=LONG, max_position_embeddings=192),
    "dynamic": tiny(rope_parameters=DYNAMIC, max_position_embeddings=BORDER),
}
lengths = st.lists(st.integers(2, 2 * BORDER), min_size=1, max_size=6)


def fresh(model):
    """The model as if it had read nothing."""
    return deepcopy(model)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (LONG, BORDER),
        (DYNAMIC, 64),
        ({"rope_type": "default", "rope_theta": 1e4}, None),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, None),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}, None),
    ],
    ids=lambda rope: rope["rope_type"] if isinstance(rope, dict) else "",
)
def test_what_looks_at_the_longest_position_is_known_by_its_configuration(rope, expected):
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope)

    assert expected == _rope.limit(config)


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=15)
@given(lengths, st.integers(1, 60))
def test_a_score_is_that_of_the_text_alone(kind, lengths, tokens):
    model = fresh(MODELS[kind])
    requests = [Request(tuple((7 * n + n * n) % 300 for n in range(length)), length // 2) for length in lengths]
    requests += [Request((*range(BORDER // 2), end), BORDER // 2) for end in (50, 60)]

    found = [value for value, _ in Tree(model, tokens=tokens).score(requests)]

    for request, value in zip(requests, found, strict=True):
        ids = torch.tensor([request.ids])
        with torch.inference_mode():
            logs = fresh(MODELS[kind])(ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
        wanted = ids[0, request.first :]
        assert float(logs[range(request.first - 1, len(logs)), wanted].sum()) == pytest.approx(value, abs=1e-3)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 2 * BORDER), min_size=1, max_size=5))
def test_an_answer_is_that_of_generate_after_the_prompt_alone(sizes):
    model, tokenizer = fresh(MODELS["longrope"]), byte_tokenizer()
    prompts = [[65 + (5 * n) % 26 for n in range(size)] for size in sizes]

    found = answer(model, tokenizer, prompts, new_tokens=12)

    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=257, pad_token_id=0)
    for ids, said in zip(prompts, found, strict=True):
        fed = torch.tensor([ids])
        made = fresh(MODELS["longrope"]).generate(fed, generation_config=config, attention_mask=torch.ones_like(fed))
        made = made[0, len(ids) :].tolist()
        assert tokenizer.decode(ids + made, skip_special_tokens=True) == tokenizer.decode(ids) + said.text


def test_the_perplexity_of_a_text_does_not_depend_on_those_of_its_batch(tmp_path):
    texts = ["a short row of text", "a longer row, " * 4, "another short row", "and one more that is long " * 3]
    (tmp_path / "test.txt").write_text("\n\n".join(texts))
    data, model = open_data(str(tmp_path), base="x"), fresh(MODELS["longrope"])

    one, all_ = (
        perplexity(
            model, byte_tokenizer(), data, PerplexityProtocol(name="e", batch_size=size, length=96), device="cpu"
        )
        for size in (1, 8)
    )

    assert len(one.sample_means) == 4
    assert one.sample_means == pytest.approx(all_.sample_means, rel=1e-5)


def test_a_lean_step_keeps_to_texts_that_no_position_changes():
    model = MODELS["longrope"]

    assert lean_step(model, BORDER) is not None
    assert lean_step(model, BORDER + 1) is None
