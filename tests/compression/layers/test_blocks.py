"""Weights in ggml's block types: what is cut keeps its bytes where it can, and what cannot be cut says why."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import gaussian, seeds

from compression import LayerError
from compression.layers.blocks import Blocks
from compression.layers.linear import Linear
from compression.numeric import ggml


def read_alone(name, rows=4, cols=512):
    """A part of a type that is not written, its scales small."""
    kind, draw = ggml.TYPES[name], np.random.default_rng(0)
    raw = draw.integers(0, 256, (rows * cols // kind.weights, kind.bytes), dtype=np.uint8)
    for at in kind.halves:
        raw[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return Blocks.from_raw(torch.from_numpy(raw.reshape(rows, -1)), name, cols, dtype=torch.float32)


@pytest.mark.parametrize("name", ggml.encodable())
@given(seed=seeds)
def test_a_part_takes_the_bytes_of_its_type(name, seed):
    part = Blocks.from_weight(gaussian(4, 512, seed=seed), name)

    assert 4 * ggml.row_bytes(name, 512) == part.bytes
    assert f"ggml {name}" == part.words
    assert "dequantize" == Linear(part).kernel_name()


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q5_K", "Q4_K"])
def test_whole_blocks_of_any_type_keep_their_bits(name):
    part = read_alone(name)

    cut = part.columns(torch.arange(256, 512))

    assert torch.equal(part.value()[:, 256:], cut.value())
    assert torch.equal(part.value()[[3, 1]], part.rows(torch.tensor([3, 1])).value())
    places = torch.tensor([[3], [1]])
    assert torch.equal(part.value()[places], part.lookup(places))


@given(seed=seeds, kept=st.permutations(range(64)))
def test_cut_blocks_are_rounded_anew(seed, kept):
    part = Blocks.from_weight(gaussian(4, 64, seed=seed), "Q8_0")
    kept = torch.tensor(sorted(kept[:32]))

    cut = part.columns(kept)

    assert torch.equal(ggml.encode(part.value()[:, kept], "Q8_0"), cut.raw)


def test_a_merged_weight_is_rounded_anew_where_the_type_can_be_written():
    assert Blocks.from_weight(gaussian(4, 64), "Q4_0").takes_others
    assert not read_alone("Q2_K").takes_others


def set_scale_to_infinity():
    part = Blocks.from_weight(gaussian(4, 64), "Q4_0")
    raw = part.raw.clone()
    raw[:, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    Blocks.from_raw(raw, "Q4_0", 64, dtype=torch.float32)


REFUSED = {
    "type": (lambda: Blocks("Q9_0", 4, 64, dtype=torch.float32), "type='Q9_0' must be one of"),
    "tiles": (lambda: Blocks("Q4_K", 4, 64, dtype=torch.float32), "do not tile 64 inputs; llama.cpp takes Q5_0"),
    "cut": (lambda: read_alone("Q3_K").columns(torch.arange(0, 512, 2)), "whole blocks of 256 inputs can go"),
    "left": (lambda: read_alone("Q3_K").columns(torch.arange(100)), "do not tile 100 inputs"),
    "nan": (lambda: Blocks.from_weight(gaussian(4, 64) / 0, "Q4_0"), "the weight has NaN or infinite values"),
    "scales": (set_scale_to_infinity, "scales that are NaN or infinite"),
    "bytes": (lambda: Blocks.from_raw(torch.zeros(4, 3, dtype=torch.uint8), "Q4_0", 32, dtype=torch.float32),
              r"raw must be uint8 \(4, 18\), and is uint8 \(4, 3\)"),
    "again": (lambda: read_alone("Q5_K").again(gaussian(4, 512)), "Q5_K is read and not written"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_stored_says_why(call, words):
    with pytest.raises(LayerError, match=words):
        call()
