"""One layer of a published GPTQ or AWQ checkpoint: read bit for bit, and written as it was."""

import torch
from formats import dequantized, describe
from hypothesis import given
from hypothesis import strategies as st
from published import awq_tensors, gptq_tensors, random_layer

from compression.checkpoints.formats import awq, gptq
from compression.checkpoints.formats.description import Published
from compression.checkpoints.formats.layer import StoredLayer
from compression.numeric import packing


@st.composite
def descriptions(draw):
    method = draw(st.sampled_from(("gptq", "awq")))
    return Published(
        quant_method=method,
        bits=draw(st.sampled_from((2, 3, 4, 8))) if method == "gptq" else 4,
        group_size=draw(st.sampled_from((16, 32, -1))),
        symmetric=draw(st.booleans()) if method == "gptq" else False,
        version=draw(st.sampled_from(("gptq", "gptq_v2"))) if method == "gptq" else "gemm",
        desc_act=draw(st.booleans()) if method == "gptq" else False,
    )


def written_by_hand(layer, published):
    return awq_tensors(layer) if published.quant_method == "awq" else gptq_tensors(layer, published.bits,
                                                                                  published.version)  # fmt: skip


def format_of(published):
    return {"gptq": gptq, "awq": awq}[published.quant_method]


@given(descriptions(), st.integers(0, 99), st.sampled_from((None, 0, "max")))
def test_a_tensor_in_the_published_layout_dequantizes_bit_for_bit(published, seed, zeros):
    layer = random_layer(
        32, 64, published.bits, published.group_size, symmetric=published.symmetric, desc_act=published.desc_act,
        zeros={0: 0, "max": 2**published.bits - 1}.get(zeros), seed=seed,
    )  # fmt: skip
    tensors = written_by_hand(layer, published)

    stored = format_of(published).read(tensors, published)

    assert torch.equal(layer.weight(), dequantized(stored, published.bits, published.group_size))
    assert (stored.permutation is not None) == (published.desc_act and published.group_size != -1)


@given(descriptions(), st.integers(0, 99))
def test_writing_gives_the_published_tensors_back(published, seed):
    layer = random_layer(32, 64, published.bits, published.group_size, desc_act=published.desc_act, seed=seed)
    tensors = written_by_hand(layer, published)
    groups = layer.scales.shape[1]

    again = format_of(published).write(format_of(published).read(tensors, published), published)

    assert format_of(published).shapes(published, 32, 64, groups) == {k: tuple(v.shape) for k, v in again.items()}
    assert all(torch.equal(tensors[key], again[key]) and tensors[key].dtype == again[key].dtype for key in tensors)


@given(st.sampled_from((2, 3, 4, 8)), st.integers(0, 99))
def test_zero_points_less_one_field_by_field_are_the_same_where_none_is_zero(bits, seed):
    """As AutoGPTQ writes them."""
    layer = random_layer(32, 64, bits, 16, seed=seed)
    layer.zeros = layer.zeros.clamp(min=1)
    less_one = random_layer(32, 64, bits, 16, seed=seed)
    less_one.zeros = layer.zeros - 1

    assert torch.equal(gptq_tensors(layer, bits, "gptq")["qzeros"], gptq_tensors(less_one, bits, "gptq_v2")["qzeros"])
    assert torch.equal(layer.zeros, gptq.read(gptq_tensors(layer, bits, "gptq"),
                                              describe(bits, "gptq")).zeros)  # fmt: skip


def test_columns_in_activation_order_stay_in_theirs_where_a_permutation_is_written():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(64, generator=generator)
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=generator)
    layer = StoredLayer(packing.pack(codes, 4), torch.full((32, 4), 0.5).half(),
                        torch.arange(128, dtype=torch.uint8).view(32, 4) % 16, order)  # fmt: skip

    again = gptq.read(gptq.write(layer, describe(4, "gptq_v2")), describe(4, "gptq_v2"))

    assert torch.equal(dequantized(layer, 4, 16), dequantized(again, 4, 16))
