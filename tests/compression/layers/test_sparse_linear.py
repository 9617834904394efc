"""Sparse layers: what is stored is the weight bit for bit, in the bytes of the formula, and multiplies as dense."""

import json

import pytest
import torch
from checkpoints import rewrite
from hypothesis import given
from hypothesis import strategies as st
from packed_layers import sparse_linear
from pruning_cases import PATTERNS, tiny_base
from strategies import gaussian, seeds, weights

import compression
from compression import LayerError
from compression.layers.linear import Linear
from compression.layers.sparse import Sparse
from compression.numeric import sparsity


@pytest.fixture
def base(monkeypatch):
    return tiny_base(monkeypatch)


def bits_of(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@given(weights(), seeds, st.sampled_from((None, *PATTERNS)), st.booleans())
def test_what_is_stored_is_the_weight_bit_for_bit(weight, seed, pattern, odd):
    if pattern is None and odd:
        weight = weight[:, :61]  # rows that are no whole number of bytes
    pattern = pattern if pattern is None or weight.shape[1] % pattern[1] == 0 else None
    mask = sparsity.choose(gaussian(*weight.shape, seed=seed).abs(), 0.5, pattern, by_row=False)
    weight = weight.masked_fill(mask, 0)
    weight[~mask & (weight == 0)] = -0.0

    layer = sparse_linear(weight, None, pattern)

    assert torch.equal(bits_of(weight), bits_of(layer.weight))
    kept = layer.weight_part.values.numel()
    again = Linear(Sparse(*weight.shape, dtype=weight.dtype, kept=kept, pattern=pattern))
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(bits_of(weight), bits_of(again.weight))
    assert layer.stored_bytes == sum(t.nbytes for t in layer.state_dict().values())


@pytest.mark.parametrize(
    ("dtype", "pattern", "share"),
    [
        (torch.bfloat16, None, 0.5625),
        (torch.float32, None, 0.53125),
        (torch.bfloat16, (2, 4), 0.5625),
        (torch.bfloat16, (4, 8), 0.59375),
        (torch.bfloat16, (1, 4), 0.28125),
    ],
)
def test_the_share_of_bytes_is_that_of_the_formula(dtype, pattern, share):
    weight = gaussian(96, 128, dtype=dtype)
    weight = weight.masked_fill(sparsity.choose(weight.float().abs(), 0.5, pattern, by_row=False), 0)

    layer = sparse_linear(weight, None, pattern)

    assert share * weight.nbytes == layer.stored_bytes == sum(t.nbytes for t in layer.state_dict().values())


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_dense_layer(pattern, bias):
    weight = gaussian(48, 64).masked_fill(torch.arange(64) % 2 == 0, 0)
    layer = sparse_linear(weight, gaussian(1, 48)[0] if bias else None, pattern)
    x = gaussian(5, 64, std=1)
    x.requires_grad_()

    y, expected = layer(x), layer.to_linear()(x)

    assert torch.equal(expected, y)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, weight.sum(0).expand(5, 64))
    half = layer.to(torch.bfloat16)
    assert (torch.bfloat16, torch.uint8) == (
        half.dtype,
        half.get_buffer(f"weight_part.{'indices' if pattern else 'mask'}").dtype,
    )


def test_more_weights_than_the_pattern_keeps_are_refused():
    with pytest.raises(LayerError, match="3 of 4 neighbouring weights are not zero"):
        sparse_linear(torch.tensor([[1.0, 2.0, 0.0, 3.0]]), None, (2, 4))
    with pytest.raises(LayerError, match="does not divide the 6 inputs"):
        sparse_linear(torch.ones(2, 6), None, (2, 4))


def test_only_2_to_4_in_16_bits_gets_the_semi_structured_kernels_of_a_gpu(monkeypatch):
    weight = gaussian(64, 64, dtype=torch.bfloat16).masked_fill(torch.arange(64) % 2 == 0, 0)
    fits, others = sparse_linear(weight, None, (2, 4)), [
        sparse_linear(weight, None), sparse_linear(weight, None, (4, 8)),
        sparse_linear(weight.float(), None, (2, 4)), sparse_linear(weight[:40], None, (2, 4)),
    ]  # fmt: skip
    assert "densify" == fits.kernel_name() == fits.kernel_name("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    for capability, expected in (((8, 0), "semi_structured"), ((7, 5), "densify")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert expected == fits.kernel_name("cuda")
        assert {"densify"} == {layer.kernel_name("cuda") for layer in others}


def test_a_manifest_that_does_not_fit_its_tensors_is_refused(base, tmp_path):
    folder = compression.compress(base, "magnitude(store=bitmask)").save(tmp_path / "broken")
    manifest = json.loads((folder / "compression.json").read_text())
    manifest["layers"]["model.layers.0.mlp.up_proj"]["weight"]["kept"] -= 1
    rewrite(folder / "compression.json", layers=manifest["layers"])

    with pytest.raises(
        compression.CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight_part\.values has shape"
    ):
        compression.load(folder)
