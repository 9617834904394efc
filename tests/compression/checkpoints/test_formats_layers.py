"""One layer of a published GPTQ or AWQ checkpoint: read bit for bit, and written as it was."""

import torch
from formats import describe
from hypothesis import given
from hypothesis import strategies as st
from published import awq_tensors, gptq_tensors, random_layer

from compression.checkpoints.formats.description import Published
from compression.checkpoints.formats.stores import affine_store
from compression.layers.codes import Codes
from compression.numeric import packing
from compression.numeric.grids import AffineGrid


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


def read(tensors, published):
    return affine_store(published).read(tensors, 32, 64, torch.float16)


@given(descriptions(), st.integers(0, 99), st.sampled_from((None, 0, "max")))
def test_a_tensor_in_the_published_layout_dequantizes_bit_for_bit(published, seed, zeros):
    layer = random_layer(
        32, 64, published.bits, published.group_size, symmetric=published.symmetric, desc_act=published.desc_act,
        zeros={0: 0, "max": 2**published.bits - 1}.get(zeros), seed=seed,
    )  # fmt: skip
    tensors = written_by_hand(layer, published)

    stored = read(tensors, published)

    assert torch.equal(layer.weight(), stored.value())
    assert (stored.permutation is not None) == (published.desc_act and published.group_size != -1)


@given(descriptions(), st.integers(0, 99))
def test_writing_gives_the_published_tensors_back(published, seed):
    layer = random_layer(32, 64, published.bits, published.group_size, symmetric=published.symmetric,
                         desc_act=published.desc_act, seed=seed)  # fmt: skip
    tensors = written_by_hand(layer, published)
    store = affine_store(published)

    again = store.write(read(tensors, published))

    assert store.tensors(32, 64).keys() == again.keys()
    assert all(tuple(again[key].shape) in each.shapes for key, each in store.tensors(32, 64).items())
    assert all(torch.equal(tensors[key], again[key]) and tensors[key].dtype == again[key].dtype for key in tensors)


@given(st.sampled_from((2, 3, 4, 8)), st.integers(0, 99))
def test_zero_points_less_one_field_by_field_are_the_same_where_none_is_zero(bits, seed):
    """As AutoGPTQ writes them."""
    layer = random_layer(32, 64, bits, 16, seed=seed)
    layer.zeros = layer.zeros.clamp(min=1)
    less_one = random_layer(32, 64, bits, 16, seed=seed)
    less_one.zeros = layer.zeros - 1

    assert torch.equal(gptq_tensors(layer, bits, "gptq")["qzeros"], gptq_tensors(less_one, bits, "gptq_v2")["qzeros"])
    part = read(gptq_tensors(layer, bits, "gptq"), describe(bits, "gptq"))
    assert torch.equal(layer.zeros, packing.unpack(part.zero_points, bits, 4))


def test_columns_in_activation_order_stay_in_theirs_where_a_permutation_is_written():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(64, generator=generator)
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=generator)
    grid = AffineGrid(bits=4, group_size=16, symmetric=False)
    zeros = torch.arange(128, dtype=torch.uint8).view(32, 4) % 16
    params = {"scales": torch.full((32, 4), 0.5).half(), "zero_points": packing.pack(zeros, 4)}
    part = Codes.from_codes(codes, params, grid, dtype=torch.float16, permutation=order)

    again = read(affine_store(describe(4, "gptq_v2")).write(part), describe(4, "gptq_v2"))

    assert torch.equal(part.value(), again.value())
