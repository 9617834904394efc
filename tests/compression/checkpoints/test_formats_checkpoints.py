"""Whole published checkpoints: opened as they are stored, or dequantized, and computing what their weights compute."""

import pytest
import torch
from checkpoints import change_tensors, logits
from formats import AWQ, GPTQ, NAME, SYMMETRIC
from published import publish

import compression
from compression.__main__ import main
from compression.architectures import decoder
from compression.checkpoints import weights as weights_of_files

CHECKPOINTS = {
    "gptq": GPTQ,
    "gptq-v1": GPTQ | {"checkpoint_format": "gptq"},
    "gptq-sym": SYMMETRIC,
    "gptq-3bit": SYMMETRIC | {"bits": 3},
    "gptq-8bit-channel": GPTQ | {"bits": 8, "group_size": -1},
    "gptq-act-order": GPTQ | {"bits": 2, "desc_act": True},
    "awq": AWQ,
}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("quantization", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_published_checkpoint_computes_what_its_weights_compute(tmp_path, architecture, quantization):
    expected = publish(tmp_path / "p", architecture, quantization)

    opened = compression.load(tmp_path / "p")
    base = compression.open_base(str(tmp_path / "p"), dequantize=True)

    assert torch.equal(logits(expected), logits(base.model))
    torch.testing.assert_close(logits(opened.model), logits(expected), rtol=1e-4, atol=1e-5)
    assert all(
        torch.equal(expected.get_submodule(name).weight, layer.dequantize())
        for name, layer in decoder.stored_layers(opened.model).items()
    )
    assert 7 == len(decoder.stored_layers(opened.model))
    assert (base.text, base.digest) == opened.base
    assert {"replaced": 7, "kept": 3} == {
        outcome: sum(entry.outcome == outcome for entry in opened.report) for outcome in ("replaced", "kept")
    }


def test_half_precision_and_a_quantized_head_stay_as_they_are_stored(tmp_path):
    expected = publish(tmp_path, "LlamaForCausalLM", SYMMETRIC | {"lm_head": True}, dtype=torch.float16, lm_head=True)

    opened = compression.load(tmp_path)

    assert torch.equal(expected.lm_head.weight, opened.model.lm_head.dequantize())
    assert (
        torch.float16 == opened.model.lm_head.weight_part.scales.dtype == opened.model.model.embed_tokens.weight.dtype
    )


def test_layers_stored_dense_stay_dense_and_the_report_says_so(tmp_path):
    quantization = AWQ | {"modules_to_not_convert": ["up_proj"]}
    expected = publish(tmp_path, "LlamaForCausalLM", quantization, dense=(NAME,))

    opened = compression.load(tmp_path)

    assert torch.equal(expected.get_submodule(NAME).weight, opened.model.get_submodule(NAME).weight)
    assert ["kept: the checkpoint stores it uncompressed"] == [
        f"{entry.outcome}: {entry.detail}" for entry in opened.report if entry.name == NAME
    ]


def test_a_bias_of_zeros_that_the_architecture_does_not_have_is_let_go(tmp_path):
    expected = publish(tmp_path, "LlamaForCausalLM", SYMMETRIC)
    change_tensors(tmp_path, lambda t: t.update({f"{NAME}.bias": torch.zeros(64).half()}))

    torch.testing.assert_close(logits(compression.load(tmp_path).model), logits(expected), rtol=1e-4, atol=1e-5)


def test_groups_in_order_need_no_index(tmp_path):
    expected = publish(tmp_path, "LlamaForCausalLM", SYMMETRIC)
    change_tensors(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.endswith("g_idx")])

    torch.testing.assert_close(logits(compression.load(tmp_path).model), logits(expected), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_keeps_its_own_values_when_it_is_saved_in_our_format(tmp_path):
    publish(tmp_path / "p", "Qwen2ForCausalLM", SYMMETRIC, dtype=torch.bfloat16)
    opened = compression.load(tmp_path / "p")
    opened.recipe = compression.Recipe.parse("rtn(group_size=32,symmetric=true)")

    again = compression.load(opened.save(tmp_path / "own"))

    assert torch.equal(logits(opened.model), logits(again.model))
    assert torch.float16 == again.model.get_submodule(NAME).weight_part.scales.dtype


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("quantization", [GPTQ | {"bits": 2, "desc_act": True}, AWQ], ids=["gptq", "awq"])
def test_a_published_base_is_decoded_block_by_block_and_compressed_as_its_dense_twin(
    tmp_path, architecture, quantization
):
    source, ids = str(tmp_path / "p"), torch.arange(64).view(2, 32) % 48
    dense = publish(tmp_path / "p", architecture, quantization)
    recipe = "gptq(bits=3,group_size=16,samples=2,sequence_length=32)"

    compression.compress(source, recipe, calibration=ids, into=tmp_path / "out", dequantize=True)

    base = compression.open_base(source, dequantize=True)
    whole = compression.compress(base, recipe, calibration=ids)
    streamed = compression.load(tmp_path / "out")
    assert whole.base == streamed.base
    assert all(torch.equal(tensor, streamed.model.state_dict()[name])
               for name, tensor in whole.model.state_dict().items())  # fmt: skip
    assert torch.equal(logits(dense), logits(base.model))


def test_decoding_a_published_base_reads_the_tensors_of_the_layers_that_are_asked_for(tmp_path, monkeypatch):
    publish(tmp_path, "LlamaForCausalLM", AWQ)
    weights = compression.locate(str(tmp_path)).weights()
    asked, read = [], weights_of_files.read_named
    monkeypatch.setattr(weights_of_files, "read_named",
                        lambda places, names: asked.extend(each := list(names)) or read(places, each))  # fmt: skip

    found = weights.read([f"{NAME}.weight"])

    assert [f"{NAME}.weight"] == list(found)
    assert {f"{NAME}.qweight", f"{NAME}.qzeros", f"{NAME}.scales"} == set(asked)


def test_the_command_line_compresses_a_published_base_only_where_it_is_told_to(tmp_path, capsys):
    publish(tmp_path / "p", "LlamaForCausalLM", AWQ)
    command = ["rtn(group_size=32)", "--base", str(tmp_path / "p"), "--out", str(tmp_path / "out")]

    assert 2 == main(command)
    assert "already quantized (awq)" in (error := capsys.readouterr().err) and "--dequantize" in error
    assert 0 == main([*command, "--dequantize"])
    assert compression.load(tmp_path / "out").recipe.text == "rtn(group_size=32)"
