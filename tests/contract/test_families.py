"""The contract of every architecture: each method runs on it, or is refused in words; what is saved, streamed and
reopened computes the same."""

import functools

import pytest
import torch
from families import FAMILIES, SHAPES
from safetensors.torch import load_file
from tiny_models import TASK

import compression
from compression import LayerError
from compression.architectures import random_shapes
from compression.architectures.decoder import stored_layers
from compression.architectures.table import ARCHITECTURES

FEW = "samples=4,sequence_length=16"
RECIPES = {
    "rtn": "rtn(group_size=8)",
    "embeddings": "rtn(group_size=8,embeddings=8)",
    "gptq": f"gptq(group_size=8,{FEW})",
    "awq": f"awq(group_size=8,n_grid=3,{FEW})",
    "wanda": f"wanda({FEW})",
    "smoothquant": f"smoothquant({FEW})",
    "os_plus": f"os_plus({FEW},steps=2)",
    "shifted": f"os_plus({FEW},steps=2,shift=true,activations=token)",
    "rptq": f"rptq({FEW},clusters=4,head_clusters=2,rounding=nearest)",
    "kvquant": f"kvquant({FEW})",
    "quarot": f"quarot(rounding=gptq,{FEW})",
    "kv_int": "kv_int(bits=4)",
    "kivi": "kivi(group_size=4,residual=2)",
    "depth": "structured(keep_layers=1,keep_kv_heads=none)",
    "heads": "structured(keep_layers=none,keep_kv_heads=1)",
    "measured heads": f"structured(keep_layers=none,keep_kv_heads=1,heads=importance,{FEW})",
    "neurons": f"p(round_to=8,{FEW})",
    "slicegpt": f"slicegpt({FEW})",
    "recover": "recover(rank=2,warmup=0)",
    "kd": f"kd({FEW},epochs=1,batch=2,accumulation=2)",
}
HEADS = ("heads", "measured heads")
TURNING = ("slicegpt", "quarot")
MIXTURES = [name for name, row in ARCHITECTURES.items() if any(half.experts for half in row.mlps)]
EVERYDAY = ["LlamaForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM", "OPTForCausalLM"]  # the slow lane has all
LATENT = ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"]
BEHIND = ["Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM"]
MEANS = ["StableLmForCausalLM", "GPTNeoXForCausalLM", "OPTForCausalLM"]
REFUSED = {
    **{(name, turning): "norms behind its sublayers" for name in BEHIND for turning in TURNING},
    **{(name, turning): "its norms subtract the mean" for name in MEANS for turning in TURNING},
    **{(name, "slicegpt"): "put out as many channels as they read" for name in MIXTURES},
    **{(name, "neurons"): "it is a mixture of experts" for name in MIXTURES},
    **{(name, "embeddings"): "multiplies what it looks up" for name in BEHIND[:2]},
    **{(name, each): "holds a latent of both" for name in LATENT for each in ("kvquant", "kv_int", "kivi")},
    **{(name, heads): "has no grouped heads" for name in (*LATENT, *MEANS[1:]) for heads in HEADS},
    ("Gemma2ForCausalLM", "kd"): "caps its logits",
    ("Gemma2ForCausalLM", "recover"): "caps its logits",
    **{("Olmo2ForCausalLM", heads): "over all heads" for heads in HEADS},
    **{("StableLmForCausalLM", heads): "heads for the whole width alone" for heads in HEADS},
    **{("GptOssForCausalLM", heads): "attention sink" for heads in HEADS},
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 64

pytestmark = pytest.mark.usefixtures("family_shapes")


@pytest.fixture(scope="module")
def family_shapes():
    with pytest.MonkeyPatch.context() as patch:
        for name, shape in SHAPES.items():
            patch.setitem(random_shapes.SHAPES, name, shape)
        yield


@functools.cache
def base_of(family):
    return compression.open_base(f"random:{family}")


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def compress(family, recipe, **options):
    return compression.compress(base_of(family), recipe, teacher="self", downstream=TASK, **options)


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=[] if each in EVERYDAY else pytest.mark.process) for each in FAMILIES]
)
def test_every_method_runs_and_reopens_or_is_refused_with_the_reason(family, method, tmp_path):
    if (family, method) in REFUSED:
        with pytest.raises(LayerError, match=REFUSED[family, method]):
            compress(family, RECIPES[method], cache=str(tmp_path / "cache"))
        return

    result = compress(family, RECIPES[method], cache=str(tmp_path / "cache"))

    found, before = logits(result.model), logits(base_of(family).model)
    assert found.isfinite().all() and not torch.equal(found, before)
    result.save(tmp_path / "saved")
    again = compression.load(tmp_path / "saved")
    assert torch.equal(found, logits(again.model))
    assert result.stored_bytes == again.stored_bytes
    assert again.stored_bytes == sum(t.nbytes for t in load_file(*(tmp_path / "saved").glob("*.safetensors")).values())


@pytest.mark.process
@pytest.mark.parametrize("method", ["gptq", "wanda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_streamed_is_what_is_compressed_in_memory(family, method, tmp_path):
    result = compress(family, RECIPES[method])

    compression.compress_to(tmp_path / "streamed", f"random:{family}", RECIPES[method])

    streamed = compression.load(tmp_path / "streamed")
    result.save(tmp_path / "saved")
    names = [{name for path in (tmp_path / folder).glob("*.safetensors") for name in load_file(path)}
             for folder in ("streamed", "saved")]  # fmt: skip
    assert names[0] == names[1]
    assert result.report == streamed.report
    assert torch.equal(logits(result.model), logits(streamed.model))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_dense_is_a_checkpoint_that_transformers_opens(family, tmp_path):
    from transformers import AutoModelForCausalLM

    result = compress(family, "magnitude")
    result.save(tmp_path / "dense")
    attention = "sdpa" if ARCHITECTURES[family].sdpa else "eager"

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto", attn_implementation=attention)

    assert ("transformers", "vllm") == result.portable[:2]
    torch.testing.assert_close(logits(theirs.eval()), logits(result.model), rtol=1e-4, atol=1e-4)


@pytest.mark.process
@pytest.mark.parametrize("format", ["gptq", "awq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_format_holds_it_exactly_or_is_refused_in_words(family, format, tmp_path):
    shape = SHAPES[family] | {"dtype": "bfloat16"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_shapes.SHAPES, family, shape)
        result = compression.compress(f"random:{family}", f"{format}(group_size=32,{FEW})")
    if family == "GptOssForCausalLM":
        with pytest.raises(LayerError, match="one tensor of all of them"):
            result.save(tmp_path / "saved", format=format)
        return

    result.save(tmp_path / "saved", format=format)
    again = compression.load(tmp_path / "saved")

    assert format in result.published_formats
    assert torch.equal(logits(result.model), logits(again.model))
    dense = compression.open_base(str(tmp_path / "saved"), dequantize=True).model
    for name, layer in stored_layers(result.model).items():
        assert torch.equal(dense.get_submodule(name).weight, layer.dequantize())
