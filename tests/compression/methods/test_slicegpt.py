"""SliceGPT: without a slice nothing changes; what is cut are the directions of least variance; artefacts, decoding."""

import copy

import pytest
import torch
from exact_models import TOKENS, model_of, norms_in_fp64, orthogonal  # noqa: F401

import compression
from bench.measure.decode_step import lean_step
from bench.measure.generation import _static_cache
from compression import LayerError, RecipeError
from compression.architectures.decoder import Decoder
from compression.architectures.description import describe
from compression.architectures.table import ARCHITECTURES
from compression.architectures.turned import TurnedBlock
from compression.calibration.capture import Stream
from compression.methods.base import Context
from compression.methods.pruning.structured.slicegpt import SliceGPT

SMALL = "samples=8,sequence_length=20"
IDS = torch.randint(48, (8, 20), generator=torch.Generator().manual_seed(2))


def sliced(model, share, ids=IDS):
    """A copy of a model after the method, without a runner around it."""
    changed = copy.deepcopy(model)
    method, context = SliceGPT(share=share), Context(None, "cpu", 0, lambda *_: None, ids=ids)
    method.compress_model(Decoder(changed), Stream(changed, ids), context)
    return changed


def logits(model):
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


def difference(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("family", [name for name, row in ARCHITECTURES.items() if row.unturned is None])
@pytest.mark.parametrize("tied", [False, True])
def test_without_a_slice_the_function_is_the_same(family, tied, dtype, close):
    model = model_of(family, 5, tied).to(dtype)

    turned = sliced(model, 0.0)
    close = max(close, 1e-5 * family.startswith("Deepseek"))  # their routers multiply in fp32

    assert all(isinstance(block.module, TurnedBlock) for block in Decoder(turned).blocks)
    assert close > difference(logits(turned), logits(model)) > 0


def test_a_stream_of_few_directions_loses_nothing_but_the_others():
    model = model_of("MistralForCausalLM", 3)
    directions = torch.linalg.qr(torch.randn(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7)))[
        0
    ]
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight @ directions @ directions.T
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.data = directions @ directions.T @ writer.weight

    half = sliced(model, 0.5)

    assert {16} == {len(place.norm.weight) for place in Decoder(half).places()}
    assert 1e-6 > difference(logits(half), logits(model))  # directions of the fp32 sums of the calibration
    assert 1e-2 < difference(logits(sliced(model, 0.75)), logits(model))


def test_the_directions_that_stay_are_those_of_most_variance():
    model = model_of("LlamaForCausalLM", 3)
    states = torch.cat([x for x in model.model.embed_tokens(IDS)])
    _, expected = torch.linalg.eigh(states.T @ states)

    changed = sliced(model, 0.25)

    basis = expected.flip(-1)[:, :24]
    projected = states @ basis @ basis.T
    embedded = changed.model.embed_tokens(IDS).flatten(0, 1)
    torch.testing.assert_close(embedded.norm(dim=-1), projected.norm(dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_it_is_decoded_with_a_cache_and_by_the_step_of_the_benchmarks(family):
    model = sliced(model_of(family, 4).float(), 0.25)
    cache, expected = _static_cache(model.config, 2, 20), logits(model)
    with torch.inference_mode():
        model(TOKENS[:, :19], past_key_values=cache, use_cache=True)
        by_model = model(TOKENS[:, 19:], past_key_values=copy.deepcopy(cache), use_cache=True).logits[:, 0]
        by_step = lean_step(model, 20)(TOKENS[:, 19:], 19, cache)[:, 0]

    torch.testing.assert_close(by_model, expected[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_step, expected[:, -1], rtol=1e-4, atol=1e-4)


def test_it_is_saved_as_a_folder_of_its_own_kind_and_quantized_behind(folder, tmp_path):
    result = compression.compress(str(folder), f"slicegpt({SMALL})-rtn(group_size=8)", calibration=IDS)
    plain = compression.compress(str(folder), f"slicegpt({SMALL})", calibration=IDS)

    opened = compression.load(result.save(tmp_path / "packed"))
    alone = compression.load(plain.save(tmp_path / "plain"))

    assert torch.equal(logits(result.model), logits(opened.model))
    assert torch.equal(logits(plain.model), logits(alone.model))
    assert describe(plain.model) == describe(alone.model) != []
    assert () == plain.portable == alone.portable
    assert plain.stored_bytes == alone.stored_bytes < compression.compress(str(folder), "fp16").stored_bytes
    with pytest.raises(compression.CheckpointError, match="is compressed already"):
        compression.open_base(str(tmp_path / "plain"))


def test_layers_go_before_and_not_behind(folder):
    with pytest.raises(LayerError, match="remove layers before the step that turns it"):
        compression.compress(str(folder), f"slicegpt({SMALL})-structured(keep_layers=1)", calibration=IDS)
    compression.compress(str(folder), f"structured(keep_layers=1)-slicegpt({SMALL})", calibration=IDS)


def test_zeros_of_a_step_before_would_be_lost_and_are_not(folder):
    with pytest.raises(RecipeError, match="would lose the zeros"):
        compression.compress(str(folder), f"magnitude-slicegpt({SMALL})", calibration=IDS)


def test_a_slice_of_all_is_refused_before_any_work(folder):
    with pytest.raises(LayerError, match="fewer than 8 of 32 channels"):
        compression.compress(str(folder), "slicegpt(share=0.9)", calibration=IDS)
    with pytest.raises(RecipeError, match="must be from 0 to below 1"):
        compression.Recipe.parse("slicegpt(share=1.0)")
