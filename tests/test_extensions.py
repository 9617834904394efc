"""A kind of part, a method and a format that another package adds: saved, opened, cut, moved, counted, run, exported.

Nothing in the package names them: they are defined here, as a user would.
"""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from checkpoints import logits, transformers_model
from torch import nn

import compression
from bench.metrics import size
from compression import LayerError, Recipe, RecipeError
from compression.architectures.decoder import decoder_blocks, stored_layers
from compression.checkpoints.artefact import Compressed
from compression.checkpoints.base import build
from compression.checkpoints.formats import registry as formats
from compression.checkpoints.size import stored_bytes
from compression.layers import describe, parts, restore
from compression.layers.linear import Linear
from compression.layers.parts import OutputPart, WeightPart, part
from compression.methods.base import Quantizer
from compression.numeric import packing
from compression.recipes.registry import METHODS, method


class Signs(WeightPart):
    """Every weight is a sign times the scale of its row: BinaryConnect, arXiv:1511.00363, with scales."""

    def __init__(self, signs, scales, cols):
        super().__init__()
        self.cols = cols
        self.register_buffer("signs", signs)
        self.register_buffer("scales", scales)

    @classmethod
    def from_weight(cls, weight):
        signs = packing.pack((weight > 0).to(torch.uint8), 1)
        return cls(signs, weight.detach().abs().mean(-1), weight.shape[1])

    @classmethod
    def empty(cls, rows, cols, *, dtype):
        width = packing.packed_width(cols, 1)
        signs = torch.empty(rows, width, dtype=torch.uint8, device="meta")
        return cls(signs, torch.empty(rows, dtype=getattr(torch, dtype), device="meta"), cols)

    @property
    def settings(self):
        return {"dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def shape(self):
        return len(self.scales), self.cols

    @property
    def dtype(self):
        return self.scales.dtype

    @property
    def follows_dtype(self):
        return frozenset({"scales"})

    def value(self, dtype=None):
        signs = packing.unpack(self.signs, 1, self.cols).float() * 2 - 1
        return (signs * self.scales.float()[:, None]).to(dtype or self.dtype)

    def rows(self, kept):
        return Signs(self.signs[kept], self.scales[kept], self.cols)

    def columns(self, kept):
        signs = packing.unpack(self.signs, 1, self.cols)[:, kept]
        return Signs(packing.pack(signs, 1), self.scales, len(kept))


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


class SignsFormat(formats.Format):
    """All layers of the blocks as signs, in files of its own."""

    name = "signs"
    runtimes = ("an engine of ours",)

    def accepts(self, layer):
        kind = layer.weight_part.kind if isinstance(layer, Linear) else "dense"
        return None if kind == "test_signs" else f"it holds signs, not {kind}"

    def write(self, model, recipe):
        self.check(model)
        renamed = {name.replace(".weight_part.signs", ".bits"): t for name, t in model.state_dict().items()}
        return formats.Written(renamed, {"signs.json": {"recipe": recipe.to_json()}})

    def reads(self, folder):
        return (folder / "signs.json").exists()

    def read(self, source):
        from safetensors.torch import load_file

        model = build(source.config, torch.bfloat16, device="meta")
        for block in decoder_blocks(model):
            for name, linear in block.linears():
                shape = linear.out_features, linear.in_features
                block.replace(name, Linear(Signs.empty(*shape, dtype="bfloat16"), linear.bias))
        (path,) = source.files
        tensors = {name.replace(".bits", ".weight_part.signs"): t for name, t in load_file(path).items()}
        model.load_state_dict(tensors, assign=True)
        recipe = Recipe.from_json(json.loads((source.folder / "signs.json").read_text())["recipe"])
        return model, recipe


@pytest.fixture(autouse=True)
def added():
    """As another package would, with its import; taken out again for other tests."""
    known, methods = dict(parts.KINDS), dict(compression.list_methods())
    part("test_signs", place="weight")(Signs)
    part("test_clipped", place="output")(Clipped)
    formats.register(SignsFormat())

    @method("test_signs", keeps_zeros=False)
    @dataclass(frozen=True, kw_only=True)
    class Binary(Quantizer):
        """Keep the sign of every weight."""

        def compress_linear(self, linear, context):
            clipped = Clipped(4.0) if linear.out_features < linear.in_features else None
            return Linear(Signs.from_weight(linear.weight), linear.bias, output_part=clipped)

    yield
    formats.unregister("signs")
    for registry, before in ((parts.KINDS, known), (METHODS, methods)):
        registry.clear()
        registry.update(before)


@pytest.fixture
def base(tmp_path):
    model = transformers_model("LlamaForCausalLM", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_a_method_of_the_new_kind_runs_and_its_result_opens_bit_for_bit(base, tmp_path):
    result = compression.compress(base, "test_signs")

    again = compression.load(result.save(tmp_path / "out"))

    assert {"dequantize", "simulated"} >= set(result.kernels()) and 14 == sum(result.kernels().values())
    assert {"test_signs"} == {layer.weight_part.kind for layer in stored_layers(again.model).values()}
    assert torch.equal(logits(result.model), logits(again.model))
    assert result.report == again.report and "test_signs" in result.report[0].detail


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

    assert {"test_signs"} == {layer.weight_part.kind for layer in stored_layers(result.model).values()}
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
    layer = compression.compress(base, "test_signs").model.model.layers[0].mlp.up_proj
    again = restore(json.loads(json.dumps(describe(layer))))

    assert describe(layer) == describe(again)


def test_it_is_exported_in_a_format_that_holds_it_and_opened_again(base, tmp_path):
    result = compression.compress(base, "test_signs")

    assert ("signs",) == result.published_formats and ("an engine of ours",) == result.portable
    again = compression.load(result.save(tmp_path / "out", "signs"))

    assert not (tmp_path / "out" / "compression.json").exists()
    assert "test_signs" == again.recipe.text
    for name, layer in stored_layers(result.model).items():
        assert torch.equal(layer.weight, stored_layers(again.model)[name].weight)


def test_the_format_refuses_what_it_does_not_hold(base, tmp_path):
    result = compression.compress(base, "rtn(group_size=32)")

    with pytest.raises(LayerError, match=r"format signs cannot hold .*self_attn\.q_proj: it holds signs"):
        result.save(tmp_path / "out", "signs")
    assert "signs" not in result.published_formats and not (tmp_path / "out").exists()


def test_formats_that_do_not_name_the_kind_refuse_it(base, tmp_path):
    result = compression.compress(base, "test_signs")

    with pytest.raises(LayerError, match="kind test_signs"):
        result.save(tmp_path / "out", "gptq")


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(LayerError, match=r"'test_signs' .* choose another name"):
        part("test_signs", place="weight")(type("Other", (Signs,), {}))
    with pytest.raises(RecipeError, match="'signs' is registered already"):
        formats.register(SignsFormat())


def test_an_artefact_of_a_kind_that_is_not_known_here_is_refused_in_words(base, tmp_path):
    folder = compression.compress(base, "test_signs").save(tmp_path / "out")
    del parts.KINDS["test_signs"]

    with pytest.raises(compression.CheckpointError, match="a table whose kind is one of codes"):
        compression.load(folder)


def test_a_model_made_by_hand_is_saved_too(tmp_path):
    model = transformers_model("LlamaForCausalLM", dtype=torch.bfloat16)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]:
        model.set_submodule(name, Linear(Signs.from_weight(linear.weight), linear.bias))
    saved = Compressed(model.requires_grad_(False), Recipe(), ("tiny", "0")).save(tmp_path / "out")

    opened = stored_layers(compression.load(saved).model)
    assert all(torch.equal(layer.weight, opened[name].weight) for name, layer in stored_layers(model).items())
