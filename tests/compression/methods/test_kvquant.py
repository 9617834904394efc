"""KVQuant: what keys and values become, for whole texts and behind a cache; behind other methods; artefacts."""

import copy

import pytest
import torch
from checkpoints import logits

import compression
from bench.measure.decode_step import lean_step
from bench.measure.generation import _static_cache
from compression.architectures.decoder import Decoder

IDS = torch.randint(48, (8, 24), generator=torch.Generator().manual_seed(4))
SMALL = "samples=8,sequence_length=24"
PATHS = ("self_attn.k_proj", "self_attn.v_proj")


def outputs(model, ids):
    """What the key and value layers of a model put out, (tokens, channels), by name."""
    seen, hooks = {}, []
    for block in Decoder(model).blocks:
        for path in PATHS:
            name = block.full(path)
            hooks.append(block.layer(path).register_forward_hook(
                lambda _, x, y, name=name: seen.update({name: y})))  # fmt: skip
    with torch.inference_mode():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("bits", [1, 3])
def test_a_channel_has_as_many_values_as_levels_but_for_outliers_and_the_first_token(folder, bits):
    base = compression.open_base(str(folder))
    result = compression.compress(base, f"kvquant(bits={bits},outliers=0,{SMALL})", calibration=IDS)
    before = outputs(base.model, IDS)

    for name, y in outputs(result.model, IDS).items():
        values = y[:, 1:].flatten(0, 1)
        part = result.model.get_submodule(name).output_part
        inside = (values >= part.low) & (values <= part.high)
        assert all(len(column[held].unique()) <= 2**bits for column, held in zip(values.T, inside.T, strict=True)), name
        if name.startswith("model.layers.0"):
            assert inside.all(), name
            assert torch.equal(before[name][:, 0], y[:, 0]), name  # the first token stays as it is


def test_outliers_stay_and_the_rest_is_nearest_to_its_level(folder):
    base = compression.open_base(str(folder))
    before = outputs(base.model, IDS)
    result = compression.compress(base, f"kvquant(outliers=0.2,keep_first=0,{SMALL})", calibration=IDS)

    name = "model.layers.0.self_attn.v_proj"
    after, part = outputs(result.model, IDS)[name].flatten(0, 1), result.model.get_submodule(name).output_part
    y = before[name].flatten(0, 1)
    same = after == y
    assert 0.15 < float(same.float().mean()) < 0.25
    assert torch.equal(same, (y < part.low) | (y > part.high) | same)
    nearest = (y[..., None] - part.levels).abs().argmin(-1)
    expected = part.levels.gather(1, nearest.T).T
    assert torch.equal(after[~same], expected[~same])


@pytest.mark.parametrize("keep_first", [0, 3])
def test_a_cache_changes_nothing(folder, keep_first):
    """Tokens are where they are, whichever pass they come in: a static cache, the step of the benchmarks."""
    result = compression.compress(str(folder), f"kvquant(keep_first={keep_first},{SMALL})", calibration=IDS)
    model, ids = result.model.double(), IDS[:2]
    step = lean_step(model, 24)
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        for split in (1, 2, 23):
            cache = _static_cache(model.config, 2, 24)
            found = [model(ids[:, :split], past_key_values=cache, use_cache=True).logits]
            stepped = copy.deepcopy(cache)
            for at in range(split, 24):
                found.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-6, atol=1e-6)
            by_step = [step(ids[:, at : at + 1], at, stepped) for at in range(split, 24)]
            torch.testing.assert_close(torch.cat(by_step, 1), expected[:, split:], rtol=1e-4, atol=1e-4)


BESIDE_OTHERS = (
    "kvquant({0})",
    "rtn(group_size=32)-kvquant({0})",
    "kvquant({0})-rtn(group_size=32)",
    "wanda({0})-kvquant({0})",
    "kvquant({0})-structured(keep_layers=1)",
    "kvquant({0})-smoothquant(smooth=norms,{0})",
    "kvquant({0})-gptq(group_size=8,{0})",
    "kvquant({0})-awq(group_size=8,{0})",
)


@pytest.mark.parametrize("text", BESIDE_OTHERS)
def test_it_stays_behind_and_before_others_and_is_opened_again(folder, tmp_path, text):
    result = compression.compress(str(folder), text.format(SMALL), calibration=IDS)

    opened = compression.load(result.save(tmp_path / "saved"))

    for block in Decoder(opened.model).blocks:
        assert all("levels" == block.layer(path).output_part.kind for path in PATHS)
    assert torch.equal(logits(result.model), logits(opened.model))
    assert () == result.portable


def test_it_is_streamed_with_the_same_bits(folder, tmp_path):
    recipe = f"kvquant({SMALL})"
    result = compression.compress(str(folder), recipe, calibration=IDS)

    streamed = compression.load(compression.compress_to(tmp_path / "out", str(folder), recipe, calibration=IDS))

    assert torch.equal(logits(result.model), logits(streamed.model))
    assert result.report == streamed.report


def test_values_whose_levels_are_known_are_not_scaled_any_more(folder):
    result = compression.compress(str(folder), f"kvquant({SMALL})-awq(group_size=8,{SMALL})", calibration=IDS)

    told = {entry.name: entry.detail for entry in result.report if entry.detail.startswith("awq")}
    assert "not scaled because what model.layers.1.self_attn.v_proj puts" in told["model.layers.1.self_attn.o_proj"]
    with pytest.raises(compression.LayerError, match="what it reads or puts out is quantized"):
        compression.compress(str(folder), f"kvquant({SMALL})-smoothquant({SMALL})", calibration=IDS)
