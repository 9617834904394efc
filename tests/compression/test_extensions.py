"""A kind of part, a method, a format and an architecture that another package adds: saved, opened, cut, moved, counted,
run, exported.

Nothing in the package names them: they are those of the pages on extending, and a part for outputs.
"""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from checkpoints import TOKENS, logits, transformers_model
from docs_pages import DOCS, declared
from torch import nn

import compression
from bench.measure.decode_step import lean_step
from bench.measure.generation import _static_cache
from bench.metrics import size
from compression import LayerError, Recipe, RecipeError
from compression.__main__ import main
from compression.architectures.decoder import stored_layers
from compression.checkpoints.artefact import Compressed
from compression.checkpoints.formats import registry as formats
from compression.checkpoints.size import stored_bytes
from compression.layers import describe, parts, restore
from compression.layers.linear import Linear
from compression.layers.low_rank import LowRank
from compression.layers.parts import OutputPart, part
from compression.methods.base import Quantizer
from compression.recipes.registry import method


class Clipped(OutputPart):
    """Outputs of at most some size."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    @property
    def settings(self):
        return {"most": self.most}

    def forward(self, y):
        return y.clamp(-self.most, self.most)


@pytest.fixture(autouse=True)
def space():
    """What the pages on extending declare, and a part for outputs; taken out again for other tests."""
    with declared(DOCS / "extend" / "a-part.md") as space, declared(DOCS / "extend" / "a-format.md") as more:
        part("test_clipped", place="output")(Clipped)

        @method("test_signs", keeps_zeros=False)
        @dataclass(frozen=True, kw_only=True)
        class Binary(Quantizer):
            """Keep the sign of every weight."""

            def compress_linear(self, linear, context):
                clipped = Clipped(4.0) if linear.out_features < linear.in_features else None
                return Linear(space["Signs"].from_weight(linear.weight), linear.bias, output_part=clipped)

        yield space | more


@pytest.fixture
def base(tmp_path):
    model = transformers_model("LlamaForCausalLM", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_a_method_of_the_new_kind_runs_and_its_result_opens_bit_for_bit(base, tmp_path):
    result = compression.compress(base, "test_signs")

    again = compression.load(result.save(tmp_path / "out"))

    assert {"dequantize", "simulated"} >= set(result.kernels()) and 14 == sum(result.kernels().values())
    assert {"signs"} == {layer.weight_part.kind for layer in stored_layers(again.model).values()}
    assert torch.equal(logits(result.model), logits(again.model))
    assert result.report == again.report and "signs" in result.report[0].detail


def test_what_is_counted_is_what_is_stored(base):
    result = compression.compress(base, "test_signs")

    layer = result.model.model.layers[0].mlp.up_proj
    assert 128 * (64 // 8) + 128 * 2 == layer.stored_bytes
    assert result.stored_bytes == size.stored(result.model) == stored_bytes(result.model)
    assert result.parameters == compression.open_base(base).model.num_parameters()


@pytest.mark.parametrize("cut", ["structured(keep_layers=1,keep_kv_heads=1)", "p(ratio=0.5,round_to=32)"])
def test_it_is_cut_and_stays_what_it_is(base, tmp_path, cut):
    recipe = f"test_signs-{cut}".replace("round_to=32", "round_to=32,samples=4,sequence_length=12")

    result = compression.compress(base, recipe, calibration="random")

    assert {"signs"} == {layer.weight_part.kind for layer in stored_layers(result.model).values()}
    again = compression.load(result.save(tmp_path / "out"))
    assert torch.equal(logits(result.model), logits(again.model))


def test_it_is_copied_and_changes_its_dtype_and_device(base):
    model = compression.compress(base, "test_signs").model

    moved = copy.deepcopy(model).to(torch.float32)

    layer = moved.model.layers[0].mlp.up_proj
    assert (torch.float32, torch.uint8) == (layer.dtype, layer.weight_part.signs.dtype)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.float(), layer.weight)
    assert all(tensor.is_meta for tensor in copy.deepcopy(moved).to("meta").state_dict().values())


def test_an_adapter_lies_beside_it(base):
    plain = compression.compress(base, "test_signs").model.model.layers[0].mlp.up_proj
    adapter = LowRank(torch.randn(4, 64, dtype=torch.bfloat16), torch.randn(128, 4, dtype=torch.bfloat16))
    layer = Linear((plain.weight_part, adapter), plain.bias)

    again = restore(json.loads(json.dumps(describe(layer))))
    again.load_state_dict(layer.state_dict(), assign=True)

    x = torch.randn(3, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), plain(x) + adapter.multiply(x), atol=0.1, rtol=0.05)
    assert torch.equal(layer(x), again(x)) and not torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_is_exported_in_a_format_that_holds_it_and_opened_again(tmp_path, tied, dtype):
    model = transformers_model("LlamaForCausalLM", tied=tied, dtype=dtype, hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "base")
    result = compression.compress(str(tmp_path / "base"), "test_signs")

    assert ("signs",) == result.published_formats and ("our engine",) == result.portable
    again = compression.load(result.save(tmp_path / "out", "signs"))
    result.save(tmp_path / "own")
    assert 0 == main(["convert", str(tmp_path / "own"), str(tmp_path / "converted"), "--format", "signs"])
    converted = compression.load(tmp_path / "converted").model.state_dict()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in again.model.state_dict().items())

    assert not (tmp_path / "out" / "compression.json").exists()
    assert "test_signs" == again.recipe.text
    for name, layer in stored_layers(result.model).items():
        assert torch.equal(layer.weight, stored_layers(again.model)[name].weight)
    assert torch.equal(logits(result.model), logits(again.model))


def test_the_format_refuses_what_it_does_not_hold(base, tmp_path):
    result = compression.compress(base, "rtn(group_size=32)")

    with pytest.raises(LayerError, match=r"format signs cannot hold .*self_attn\.q_proj: it holds signs"):
        result.save(tmp_path / "out", "signs")
    assert "signs" not in result.published_formats and not (tmp_path / "out").exists()


def test_formats_that_do_not_name_the_kind_refuse_it(base, tmp_path):
    result = compression.compress(base, "test_signs")

    with pytest.raises(LayerError, match="kind signs"):
        result.save(tmp_path / "out", "gptq")


def test_a_name_that_is_taken_is_refused(space):
    with pytest.raises(LayerError, match=r"'signs' .* choose another name"):
        part("signs", place="weight")(type("Other", (space["Signs"],), {}))
    with pytest.raises(RecipeError, match="'signs' is registered already"):
        formats.register(space["SignsFormat"]())


def test_an_artefact_of_a_kind_that_is_not_known_here_is_refused_in_words(base, tmp_path):
    folder = compression.compress(base, "test_signs").save(tmp_path / "out")
    del parts.KINDS["signs"]

    with pytest.raises(compression.CheckpointError, match="a table whose kind is one of codes"):
        compression.load(folder)


def test_a_model_made_by_hand_is_saved_too(space, tmp_path):
    model = transformers_model("LlamaForCausalLM", dtype=torch.bfloat16)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]:
        model.set_submodule(name, Linear(space["Signs"].from_weight(linear.weight), linear.bias))
    saved = Compressed(model.requires_grad_(False), Recipe(), ("tiny", "0")).save(tmp_path / "out")

    opened = stored_layers(compression.load(saved).model)
    assert all(torch.equal(layer.weight, opened[name].weight) for name, layer in stored_layers(model).items())


def test_a_row_for_an_architecture_is_all_that_it_takes(tmp_path):
    """Compressed, saved, cut; decoded by the step of the benchmarks; the same logits behind an edit of its stream."""
    with pytest.raises(compression.CheckpointError, match="'SeedOssForCausalLM' is not supported"):
        compression.open_base(seed_oss(tmp_path / "refused"))
    with declared(DOCS / "extend" / "an-architecture.md"):
        base = seed_oss(tmp_path / "base")
        for recipe in ("nf4(group_size=32)", "smoothquant(samples=4,sequence_length=12)", "structured(keep_layers=1)"):
            result = compression.compress(base, recipe, calibration="random")
            again = compression.load(result.save(tmp_path / recipe.partition("(")[0]))
            assert torch.equal(logits(result.model), logits(again.model))
        recipe = "slicegpt(share=0,samples=4,sequence_length=12)"
        turned = compression.compress(base, recipe, calibration="random").model
        plain = compression.open_base(base).model
        torch.testing.assert_close(logits(turned), logits(plain), atol=0.02, rtol=0.02)  # of bf16
        assert not torch.equal(logits(turned), logits(plain))
        cache = _static_cache(plain.config, 2, 10)
        with torch.inference_mode():
            plain(TOKENS[:, :9], past_key_values=cache, use_cache=True)
            by_step = lean_step(plain, 10)(TOKENS[:, 9:], 9, cache)[:, 0]
        torch.testing.assert_close(by_step, logits(plain)[:, -1], atol=0.02, rtol=0.02)


def seed_oss(folder):
    transformers_model("SeedOssForCausalLM", attention_bias=True, attention_out_bias=True).save_pretrained(folder)
    return str(folder)
