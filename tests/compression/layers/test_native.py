"""The compiled 4-bit kernel: equal to a loop anybody can follow, in any shape, on any number of threads."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import REPOSITORY, running

from compression.errors import BackendError
from compression.layers.kernels import lut4

INTEGERS = torch.arange(16.0)  # one look-up a code
NF4 = torch.tensor(  # four look-ups, for FP4 (exact in bf16) two
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
)
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
TABLES = {"integers": INTEGERS, "fp4": FP4, "nf4": NF4, "one-odd-bit": INTEGERS + torch.tensor([0.0] * 15 + [2.0**-20])}

needs_kernel = pytest.mark.skipif(not lut4.available(), reason=f"no native kernel: {lut4.reason()}")


def dequantize(codes, table, scales, zeros, group):
    """W[n,k] = s[n,g] * (T[q[n,k]] - z[n,g]), one group at a time, in float64."""
    weight = torch.empty(codes.shape, dtype=torch.float64)
    for g in range(codes.shape[1] // group):
        part = slice(g * group, (g + 1) * group)
        zero = 0.0 if zeros is None else zeros[:, g : g + 1].double()
        weight[:, part] = scales[:, g : g + 1].double() * (table.double()[codes[:, part].long()] - zero)
    return weight


def layer(rows, columns, group, m, with_zeros, seed):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=random)
    scales = torch.rand(rows, columns // group, generator=random) - 0.3
    zeros = torch.randint(0, 16, scales.shape, generator=random).float() if with_zeros else None
    return codes, scales, zeros, torch.randn(m, columns, generator=random)


def rounding_bound(x, codes, table, scales, zeros, group):
    """What fp32 sums of K products may be off by: K roundings of at most eps/2 each, of terms before they cancel.

    Integers are multiplied as 16 + q, and 16 is taken off again: terms that cancel like a zero point.
    """
    size = 0 if zeros is None else zeros.abs().repeat_interleave(group, 1)
    if torch.equal(table, INTEGERS):
        size = size + 32
    terms = scales.abs().repeat_interleave(group, 1).double() * (table.abs().double()[codes.long()] + size)
    return (x.shape[1] + 8) * torch.finfo(torch.float32).eps / 2 * (x.abs().double() @ terms.T)


@st.composite
def shapes(draw):
    group = draw(st.sampled_from([32, 64, 128, 192, 512]))
    blocks = draw(st.integers(1, 4))
    columns = group * blocks if group > 32 else 64 * blocks
    return draw(st.integers(1, 41)), columns, group, draw(st.integers(1, 17))


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(shapes(), st.sampled_from(sorted(TABLES)), st.booleans(), st.integers(0, 2**32 - 1))
def test_the_product_equals_dequantize_and_multiply(shape, table, with_zeros, seed):
    rows, columns, group, m = shape
    table = TABLES[table]
    codes, scales, zeros, x = layer(rows, columns, group, m, with_zeros, seed)

    y = lut4.matmul(x, lut4.pack(codes), table, scales, zeros, group)

    expected = x.double() @ dequantize(codes, table, scales, zeros, group).T
    assert y.dtype == torch.float32
    assert ((expected - y).abs() <= rounding_bound(x, codes, table, scales, zeros, group)).all()


@needs_kernel
@pytest.mark.parametrize("name", TABLES)
def test_levels_and_scales_are_used_to_the_last_bit(name):
    """Rows of the identity ask for single weights: the only rounding left is that of scale * level."""
    codes, scales, _, _ = layer(16, 64, 64, 1, False, seed=3)
    x = torch.eye(64)

    y = lut4.matmul(x, lut4.pack(codes), TABLES[name], scales, None, 64)

    assert torch.equal((scales * TABLES[name][codes.long()]).T, y)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_type_and_leading_shape_are_those_of_x(dtype):
    codes, scales, zeros, x = layer(48, 128, 64, 6, True, seed=1)
    x = x.to(dtype).reshape(2, 3, 128)

    y = lut4.matmul(x, lut4.pack(codes), NF4, scales, zeros, 64)
    wide = lut4.matmul(x.float(), lut4.pack(codes), NF4, scales, zeros, 64)

    assert (dtype, (2, 3, 48)) == (y.dtype, tuple(y.shape))
    assert torch.equal(wide.to(dtype), y)  # rounded once, at the end, as torch rounds


def fixed(x, group):
    """x (bf16) as the kernel holds it for integer levels: multiples of 2^(E-13), E that of the group's largest."""
    grouped = x.double().view(x.shape[0], -1, group)
    unit = torch.exp2(grouped.abs().amax(-1, keepdim=True).log2().floor() - 13)
    return torch.where(unit > 0, (grouped / unit).round() * unit, 0).view(x.shape)


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(shapes(), st.booleans(), st.booleans(), st.floats(-20, 20), st.integers(0, 2**32 - 1))
def test_integer_levels_times_bf16_are_exact_but_for_the_fixed_point_of_x(shape, with_zeros, narrow, exponent, seed):
    rows, columns, group, m = shape
    codes, scales, zeros, x = layer(rows, columns, group, m, with_zeros, seed)
    x[:, ::7] *= 100  # outliers: the rest of their group is far below
    x = (x * 2**exponent).bfloat16()
    scales = scales.bfloat16().float() if narrow else scales  # with zeros: one pair of bf16 for each group

    y = lut4.matmul(x, lut4.pack(codes), INTEGERS, scales, zeros, group)

    portable = lut4._loaded()[0].lut4_isa() == b"portable"
    weight, held = dequantize(codes, INTEGERS, scales, zeros, group), x.double() if portable else fixed(x, group)
    size = scales.abs().repeat_interleave(group, 1).double() * (codes + (15 if with_zeros else 0))
    bound = (columns // group + 16) * torch.finfo(torch.float32).eps * (held.abs() @ size.T)
    expected = held @ weight.T
    assert ((expected - y).abs() <= bound + 2**-8 * expected.abs()).all()  # the last: bf16 of the result
    near = x.view(m, -1, group).abs() >= x.view(m, -1, group).abs().amax(-1, keepdim=True) / 64
    assert torch.equal(held.view(near.shape)[near], x.double().view(near.shape)[near])


@needs_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_not_lost(value):
    codes, scales, zeros, x = layer(8, 256, 128, 2, True, seed=4)
    x[1, 200] = value

    y = lut4.matmul(x.bfloat16(), lut4.pack(codes), INTEGERS, scales, zeros, 128)

    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1]).any()


@needs_kernel
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 3e38])
def test_x_of_any_size(size):
    codes, scales, _, x = layer(8, 128, 128, 1, False, seed=5)
    x = x.sign().mul(size).bfloat16()
    scales = scales / 1e5

    y = lut4.matmul(x, lut4.pack(codes), INTEGERS, scales, None, 128)

    expected = x.double() @ dequantize(codes, INTEGERS, scales, None, 128).T
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-37)


@needs_kernel
def test_bf16_results_round_as_in_torch():
    codes = torch.ones(8, 64, dtype=torch.uint8)
    scales = torch.tensor([1.0, 3.4e38, 3.0e38, float("nan"), -1e-40, 1.00390625, 1.01171875, 0.0])[:, None]
    x = torch.zeros(1, 64)
    x[0, 5] = 1

    y = lut4.matmul(x.bfloat16(), lut4.pack(codes), INTEGERS, scales, None, 64)

    torch.testing.assert_close(scales.T.bfloat16(), y, rtol=0, atol=0, equal_nan=True)


@needs_kernel
def test_x_may_be_strided_and_empty():
    codes, scales, zeros, x = layer(40, 128, 128, 3, True, seed=2)
    packed = lut4.pack(codes)
    strided = torch.stack([x, x], dim=-1)[..., 0]

    assert not strided.is_contiguous()
    assert torch.equal(
        lut4.matmul(x, packed, INTEGERS, scales, zeros, 128),
        lut4.matmul(strided, packed, INTEGERS, scales, zeros, 128),
    )
    assert lut4.matmul(x[:0], packed, INTEGERS, scales, zeros, 128).shape == (0, 40)


@needs_kernel
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("m", [1, 3, 4, 9])
def test_the_number_of_threads_does_not_change_a_bit(name, m):
    codes, scales, zeros, x = layer(301, 512, 32, m, True, seed=m)
    packed, before = lut4.pack(codes), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(lut4.matmul(x, packed, TABLES[name], scales, zeros, 32))
    finally:
        torch.set_num_threads(before)

    assert all(torch.equal(results[0], other) for other in results[1:])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_unpack_undoes_pack(rows, blocks, seed):
    codes, *_ = layer(rows, 64 * blocks, 64, 1, False, seed)
    packed = lut4.pack(codes)

    assert (torch.uint8, (rows, 32 * blocks)) == (packed.dtype, tuple(packed.shape))
    assert torch.equal(codes, lut4.unpack(packed, 64 * blocks))


def test_pack_puts_each_code_where_the_c_file_says():
    k = torch.arange(128)
    codes = torch.randint(0, 16, (3, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    i = k % 32
    byte = 32 * (k // 64) + 16 * (i // 4 % 2) + 8 * (i // 16) + 2 * (i % 4) + i // 8 % 2
    expected = torch.zeros(3, 64, dtype=torch.uint8)
    for column in k.tolist():
        expected[:, byte[column]] |= codes[:, column] << (4 if column & 32 else 0)

    assert torch.equal(expected, lut4.pack(codes))


@pytest.mark.parametrize(("columns", "group"), [(96, 32), (128, 48), (192, 96), (128, 256), (128, 0), (0, 64)])
def test_shapes_that_do_not_fit_the_blocks_are_not_supported(columns, group):
    assert not lut4.supports(8, columns, group)


@needs_kernel
def test_a_wrong_argument_is_refused_with_what_was_wanted():
    codes, scales, zeros, x = layer(8, 128, 64, 1, True, seed=0)
    packed = lut4.pack(codes)

    with pytest.raises(ValueError, match="group_size=48"):
        lut4.matmul(x, packed, INTEGERS, scales, zeros, 48)
    with pytest.raises(ValueError, match=r"scales and zeros float32 \(8, 2\)"):
        lut4.matmul(x, packed, INTEGERS, scales.double(), zeros, 64)
    with pytest.raises(ValueError, match="strided"):
        lut4.matmul(x, packed, INTEGERS, scales.T.contiguous().T, zeros, 64)
    with pytest.raises(ValueError, match="int64"):
        lut4.matmul(x.long(), packed, INTEGERS, scales, zeros, 64)
    with pytest.raises(ValueError, match="multiple of 64 columns"):
        lut4.pack(codes[:, :100])
    with pytest.raises(ValueError, match="packed must be"):
        lut4.unpack(packed, 64)


# ------------------------------------------------------------------------------------------------- how it is built

MULTIPLY = """
import warnings; warnings.simplefilter("error")
import torch
from compression.layers.kernels import lut4
print(lut4.available(), lut4.reason())
if lut4.available():
    codes = torch.arange(8 * 128).remainder(16).to(torch.uint8).view(8, 128)
    y = lut4.matmul(torch.ones(1, 128), lut4.pack(codes), torch.arange(16.0), torch.ones(8, 1), None, 128)
    print(y.sum().item())
"""


def starting(cache, **environment):
    wanted = {**os.environ, "COMPRESSION_CACHE": str(cache), "COMPRESSION_NATIVE": "1", "PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return running([sys.executable, "-c", MULTIPLY], env=wanted | environment, **pipes)


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.split("\n")[:-1]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Build and load the portable kernel as a new process would."""
    monkeypatch.setenv("COMPRESSION_CACHE", str(tmp_path))
    return lambda setting="portable": lut4._load.__wrapped__(setting)


def test_without_a_compiler_it_says_how_to_get_one(tmp_path):
    with starting(tmp_path, CC="/nonexistent") as process:
        (said,) = finish(process)

    assert said.startswith("False no C compiler: CC='/nonexistent' is not a command; install one")


def test_a_compiler_that_fails_is_quoted(build, tmp_path, monkeypatch):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'no such target' >&2; exit 3; }\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))

    library, _, why = build()

    assert library is None
    assert "exit status 3" in why and "no such target" in why


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("COMPRESSION_NATIVE", "0")

    assert not lut4.available()
    assert lut4.reason() == "turned off by COMPRESSION_NATIVE=0"
    with pytest.raises(BackendError, match="turned off"):
        lut4._kernel()


@needs_kernel
def test_processes_may_compile_at_the_same_time_and_leave_one_library(tmp_path):
    environment = {"COMPRESSION_NATIVE": "portable"}
    with starting(tmp_path, **environment) as one, starting(tmp_path, **environment) as other:
        expected = ["True None", str(float(8 * 128 * 7.5))]
        assert [finish(process) for process in (one, other)] == [expected, expected]
    assert len(list((tmp_path / "native").iterdir())) == 1


@needs_kernel
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_portable_loop_equals_dequantize_and_multiply_and_needs_no_cache(build, tmp_path, monkeypatch, group):
    (tmp_path / "native").write_text("a file in the way of the folder", encoding="utf-8")
    library, _, why = build()
    assert why is None
    assert library.lut4_isa() == b"portable"
    monkeypatch.setattr(lut4, "_kernel", lambda: library.lut4_matmul)
    codes, scales, zeros, x = layer(21, 384, group, 5, True, seed=group)

    y = lut4.matmul(x, lut4.pack(codes), NF4, scales, zeros, group)

    expected = x.double() @ dequantize(codes, NF4, scales, zeros, group).T
    assert ((expected - y).abs() <= rounding_bound(x, codes, NF4, scales, zeros, group)).all()
