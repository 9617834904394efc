"""kv_int, kivi and kv_fp8: what their settings mean, beside other steps, saved, streamed, refused."""

import pytest
import torch
from checkpoints import logits, transformers_model

import compression
from compression.architectures.decoder import Decoder
from compression.caches import replaying
from compression.caches.policy import Policy
from compression.errors import LayerError, RecipeError
from compression.numeric.cache_grids import Float8Grid, IntGrid

IDS = torch.randint(48, (8, 24), generator=torch.Generator().manual_seed(4))
SMALL = "samples=8,sequence_length=24"


def policy(text):
    return compression.Recipe.parse(text).steps[0].method.policy


def test_settings_are_grids():
    by_token = IntGrid(bits=4, group_size=64)
    by_channel = IntGrid(bits=2, by="channel", group_size=32)
    assert policy("kv_int(bits=4,group_size=64,residual=5)") == Policy(keys=by_token, values=by_token, residual=5)
    assert policy("kv_int(bits=2,keys=channel,keep_first=1)") == Policy(
        keys=by_channel, values=IntGrid(bits=2), keep_first=1
    )
    assert policy("kivi") == Policy(keys=by_channel, values=IntGrid(bits=2, group_size=32), residual=128)
    for scales in ("head", "token", "unit"):
        grid = Float8Grid(by=scales)
        assert policy(f"kv_fp8(scales={scales})") == Policy(keys=grid, values=grid)


BESIDE_OTHERS = ("kv_int(bits=4)", "gptq(group_size=8,{0})-kv_int(bits=4)", "kv_fp8-rtn(group_size=8)",
                 "structured(keep_layers=1,keep_kv_heads=none)-kivi(group_size=8,residual=1)",
                 "kivi(group_size=4,residual=1)-smoothquant({0})", "kvquant({0})-kv_int(bits=4)")  # fmt: skip


@pytest.mark.parametrize("text", BESIDE_OTHERS)
def test_it_stands_behind_and_before_others_and_is_opened_again(folder, tmp_path, text):
    result = compression.compress(str(folder), text.format(SMALL), calibration=IDS)

    opened = compression.load(result.save(tmp_path / "saved"))

    assert replaying.policy_of(result.model) == replaying.policy_of(opened.model) is not None
    assert torch.equal(logits(result.model), logits(opened.model))
    assert () == result.portable == result.published_formats
    with pytest.raises(LayerError, match="no place for how the cache stores keys and values"):
        result.save(tmp_path / "published", "gptq")
    with pytest.raises(LayerError, match="no place for how the cache stores keys and values"):
        compression.plan(str(folder), text.format(SMALL), calibration=IDS).check_format("gptq")
    caches = [each.cache_factory() for each in (result, opened)]
    with torch.inference_mode():
        found = [each.model(IDS, past_key_values=cache).logits
                 for each, cache in zip((result, opened), caches, strict=True)]  # fmt: skip
    assert torch.equal(*found)
    assert caches[0].nbytes == caches[1].nbytes > 0


def test_steps_see_the_layers_alone(folder):
    """The policy is of the model when all is done: calibration text and training are read without it."""
    texts = (f"kv_int(bits=2)-gptq(group_size=8,{SMALL})", f"gptq(group_size=8,{SMALL})")
    before, plain = (compression.compress(str(folder), text, calibration=IDS) for text in texts)

    codes = [result.model.state_dict() for result in (before, plain)]
    assert all(torch.equal(each, codes[1][name]) for name, each in codes[0].items())
    replaying.attach(before.model, None)
    assert torch.equal(logits(before.model), logits(plain.model))


def test_it_is_streamed_with_the_same_bits(folder, tmp_path):
    result = compression.compress(str(folder), "kivi(group_size=4,residual=1)")

    streamed = compression.load(compression.compress_to(tmp_path / "out", str(folder), "kivi(group_size=4,residual=1)"))

    assert torch.equal(logits(result.model), logits(streamed.model))
    assert result.report == streamed.report
    assert ["compressed.safetensors"] == [path.name for path in result.save(tmp_path / "saved").glob("*.safetensors")]


def test_a_manifest_that_names_no_policy_is_refused(folder, tmp_path):
    from checkpoints import rewrite

    saved = compression.compress(str(folder), "kv_fp8").save(tmp_path / "saved")
    rewrite(saved / "compression.json", cache={"keys": {"kind": "int"}})
    with pytest.raises(compression.CompressionError):
        compression.load(saved)


@pytest.mark.parametrize("text, says", [
    ("kv_int-kivi", "kv_int and kivi both say how the cache stores"),
    ("kv_int(residual=-1)", "residual=-1"),
    ("kv_int(group_size=0)", "group_size=0"),
    ("kivi(group_size=-1)", "group_size=-1"),
    ("kv_int(tokens=0)", "tokens=0"),
    ("kv_int(bits=5)", "bits"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_work(folder, text, says):
    with pytest.raises(RecipeError, match=says):
        compression.plan(str(folder), text)


def test_groups_that_do_not_tile_a_head_are_refused(folder):
    with pytest.raises(LayerError, match="group_size=5 does not divide heads of 8 channels"):
        compression.plan(str(folder), "kv_int(group_size=5)")


def test_channels_with_outliers_are_kept_by_channel(folder):
    """The order of the paper (section 3.1): keys with a few channels of outliers lose less by channel."""
    model = transformers_model("Qwen2ForCausalLM", dtype=torch.float64).eval()
    for block in Decoder(model).blocks:
        block.layer("self_attn.k_proj").bias.data[[3, 9]] += 30  # RoPE turns them, slowly
    with torch.inference_mode():
        expected = model(IDS).logits.log_softmax(-1)
        lost = {}
        for by in ("token", "channel"):
            replaying.attach(model, policy(f"kv_int(bits=2,keys={by},tokens=4)"))
            found = model(IDS).logits.log_softmax(-1)
            lost[by] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert lost["channel"] < lost["token"]
