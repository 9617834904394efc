"""Bit packing: nothing is lost, and nothing is stored that need not be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import codes

from compression.numeric.packing import pack, packed_width, unpack

all_bits = pytest.mark.parametrize("bits", range(1, 9))
out_of_range = pytest.mark.parametrize("bits", [-1, 0, 9, 16])


def bit_string(row, bits):
    """A row's codes as the bit stream that the layout promises: code i at bits [i * bits, (i + 1) * bits)."""
    return "".join(str(code >> j & 1) for code in row.tolist() for j in range(bits))


@all_bits
@given(data=st.data())
def test_unpacking_gives_back_the_codes(bits, data):
    given_codes = data.draw(codes(bits))

    packed = pack(given_codes, bits)

    assert torch.equal(given_codes, unpack(packed, bits, given_codes.shape[1]))


@all_bits
@given(data=st.data())
def test_a_row_takes_its_bits_rounded_up_to_whole_bytes(bits, data):
    given_codes = data.draw(codes(bits))
    rows, count = given_codes.shape

    packed = pack(given_codes, bits)

    assert torch.uint8 == packed.dtype
    assert (rows, (count * bits + 7) // 8) == packed.shape == (rows, packed_width(count, bits))
    assert packed.is_contiguous()


@all_bits
@given(data=st.data())
def test_codes_lie_in_one_little_endian_stream_with_zeros_after_it(bits, data):
    given_codes = data.draw(codes(bits))

    packed = pack(given_codes, bits)

    for row, stored in zip(given_codes, packed, strict=True):
        stream = bit_string(row, bits)
        assert stream.ljust(8 * packed.shape[1], "0") == bit_string(stored, 8)


@all_bits
def test_every_code_survives_in_every_place(bits):
    every = torch.arange(2**bits, dtype=torch.uint8)
    shifted = torch.stack([every.roll(shift) for shift in range(2**bits)])

    assert torch.equal(shifted, unpack(pack(shifted, bits), bits, 2**bits))


@all_bits
def test_leading_dimensions_are_kept(bits):
    given_codes = torch.ones(2, 3, 17, dtype=torch.uint8)

    packed = pack(given_codes, bits)

    assert (2, 3, packed_width(17, bits)) == packed.shape
    assert torch.equal(given_codes, unpack(packed, bits, 17))


@all_bits
def test_packing_copies_so_that_what_is_stored_cannot_change_with_the_codes(bits):
    given_codes = torch.ones(1, 16, dtype=torch.uint8)
    packed = pack(given_codes, bits)
    before = packed.clone()

    given_codes.zero_()

    assert torch.equal(before, packed)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_refused(bits):
    with pytest.raises(ValueError, match=f"code {2**bits} does not fit in {bits} bits"):
        pack(torch.tensor([[0, 2**bits]], dtype=torch.uint8), bits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bool])
def test_codes_of_another_type_are_refused(dtype):
    with pytest.raises(ValueError, match=r"torch\.uint8, not " + str(dtype)):
        pack(torch.zeros(1, 8, dtype=dtype), 8)


@out_of_range
def test_bit_widths_that_there_are_none_of_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be between 1 and 8"):
        packed_width(8, bits)
    with pytest.raises(ValueError, match=f"bits={bits} must be between 1 and 8"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits={bits} must be between 1 and 8"):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), bits, 8)
