"""Decoders cut smaller generate with every cache, are saved and counted, and the configuration agrees."""

import pytest
import torch
from checkpoints import transformers_model
from cut_models import CUTS, FAMILIES, IDS, SIZES, assert_close, compressed, folders, logits, opened, without  # noqa: F401

import compression
from bench.measure.decode_step import lean_step
from bench.measure.generation import Decoder, Load, _static_cache
from bench.metrics.compute import model_flops_per_token
from compression.checkpoints.base import byte_tokenizer


def greedy(model, how, new=10):
    """Token ids behind a prompt of seven: without a cache, with transformers' two, or by the step of the benchmarks."""
    tokens, length = IDS[:1, :7], 7 + new
    cache = None if how == "none" else _static_cache(model.config, 1, length) if how != "dynamic" else True
    step = lean_step(model, length) if how == "lean" else None
    with torch.inference_mode():
        for at in range(7, length):
            if how == "none":
                found = model(tokens, use_cache=False).logits
            elif at == 7:
                out = model(tokens, past_key_values=None if cache is True else cache, use_cache=True)
                found, cache = out.logits, out.past_key_values
            elif step is not None:
                found = step(tokens[:, -1:], at - 1, cache)
            else:
                found = model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits
            tokens = torch.cat([tokens, found[:, -1:].argmax(-1)], 1)
    return tokens[0, 7:].tolist()


@pytest.mark.parametrize(
    ("family", "text"), [*((family, CUTS[0]) for family in FAMILIES), (FAMILIES[2], CUTS[1]), (FAMILIES[3], CUTS[2])]
)
def test_generation_is_the_same_with_and_without_a_cache(family, text):
    model = compressed(family, text).model

    expected = greedy(model, "none")

    assert len(set(expected)) > 2  # else it would show nothing
    assert [expected] * 3 == [greedy(model, how) for how in ("dynamic", "static", "lean")]


def test_the_cache_shrinks_by_the_product_of_the_shares_and_the_work_by_what_was_cut():
    load = Load(prompt_tokens=5, new_tokens=4)
    base, cut = opened().model, compressed("MistralForCausalLM", CUTS[0]).model

    before, after = (Decoder(model, load).run().kv_bytes for model in (base, cut))

    assert 20 * after == 9 * before  # 3 of 5 layers, 3 of 4 heads
    assert 5 * 3 * (2 * 128 * (2 * 96 + 2 * 48) + 2 * 3 * 128 * 96 + 4 * 96 * 9) == 5 * (
        model_flops_per_token(cut, 9) - 2 * 128 * 300
    )


@pytest.mark.parametrize(("family", "text"), [*((family, CUTS[0]) for family in FAMILIES), (FAMILIES[2], CUTS[2])])
def test_what_is_saved_opens_in_plain_transformers(family, text, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = compressed(family, text)
    folder = result.save(tmp_path / "cut")

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)

    assert [set()] * 3 == [set(told[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    assert_close(logits(model.eval()), logits(result.model))
    assert torch.equal(logits(compression.load(folder).model), logits(result.model))
    assert torch.equal(logits(compression.open_base(str(folder)).model), logits(result.model))
    config, attention = model.config, model.model.layers[0].self_attn
    structured = text == CUTS[0]
    assert (3, 6, 3, 96) if structured else (5, 8, 4, 64) == (
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    )  # fmt: skip
    assert 16 == config.head_dim == attention.head_dim
    assert len(getattr(config, "layer_types", None) or model.model.layers) == config.num_hidden_layers
    assert AutoTokenizer.from_pretrained(folder).encode("abc") == byte_tokenizer().encode("abc")


def test_a_llama_whose_heads_do_not_divide_its_width_becomes_a_mistral_and_says_so():
    """128 / 6: transformers refuses the configuration of such a Llama, and computes it."""
    from transformers import LlamaConfig

    with pytest.raises(Exception, match="not a multiple"):
        LlamaConfig(hidden_size=128, num_attention_heads=6, num_key_value_heads=3).validate()

    result = compressed("LlamaForCausalLM", CUTS[0])

    assert ("MistralForCausalLM", None) == (type(result.model).__name__, result.model.config.sliding_window)
    (told,) = [entry.detail for entry in result.report if entry.name == "model"]
    assert told.startswith("a MistralForCausalLM, the same function")
    halved = compressed("LlamaForCausalLM", "structured(keep_kv_heads=2)")
    assert "LlamaForCausalLM" == type(halved.model).__name__
    assert "model" not in {entry.name for entry in halved.report}


def test_layers_of_different_attention_keep_their_kinds():
    sizes = SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
    model = transformers_model("Qwen3ForCausalLM", **sizes).eval()
    base = opened("Qwen3ForCausalLM")
    base.model = model.requires_grad_(False)

    cut = compression.compress(base, "structured(keep_layers=3)").model

    assert ["full_attention", "sliding_attention", "sliding_attention"] == cut.config.layer_types
    assert_close(logits(cut), logits(without(model, layers=[1, 2], heads=[3])))
    assert greedy(cut, "none") == greedy(cut, "dynamic")
