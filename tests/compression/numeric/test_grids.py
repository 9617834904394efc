"""Number formats: how far a weight may move, what is promised of zero, and what is stored, against slow loops."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BITS, DTYPES, affine_grids, gaussian, grids, nf4_grids, seeds, weights

from compression import LayerError, RecipeError
from compression.numeric.floats import FloatGrid
from compression.numeric.grids import AffineGrid, Int8RowGrid, SignedGrid
from compression.numeric.grouping import check_group, decode, groups_of, quantize
from compression.numeric.normal_float import DOUBLE_QUANT_BLOCK, NF4_LEVELS, SMALLEST_ABSMAX, NF4Grid, dynamic_levels
from compression.numeric.packing import unpack

EPS = torch.finfo(torch.float32).eps
TINY = 2.0**-149  # the smallest step of fp32: what a product may be off by near zero


def per_weight(grouped, weight):
    """One value per group (rows, groups) -> one per weight."""
    return grouped.repeat_interleave(weight.shape[1] // grouped.shape[1], 1)


def test_a_symmetric_grid_with_real_zero_points_is_refused():
    with pytest.raises(RecipeError, match="a symmetric grid has no zero points"):
        AffineGrid(bits=4, group_size=32, symmetric=True, float_zeros=True)


def groups(weight, grid):
    """float64 (rows, groups, group size)."""
    return weight.double().view(weight.shape[0], groups_of(weight.shape[1], grid.group_size), -1)


# --- Signed -----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), seeds)
def test_clipped_scales_are_those_of_least_error_among_the_candidates(bits, seed):
    grid, weight = SignedGrid(bits=bits), gaussian(3, 40, seed=seed)
    weight[1] = 0
    found, full = grid.fit_clipped(weight, 10, 0.8)["scales"], grid.fit(weight)["scales"]

    for row, scale, largest in zip(weight, found, full, strict=True):
        errors = {}
        for part in range(10):
            one = {"scales": (largest * (1 - 0.8 * part / 10))[None]}
            errors[float(one["scales"])] = float((decode(grid, grid.encode(row[None], one), one) - row).square().sum())
        assert pytest.approx(min(errors.values()), rel=1e-4) == errors[float(scale)]


# --- Affine -----------------------------------------------------------------------------------------------------------


@given(affine_grids, weights())
def test_no_weight_moves_by_more_than_half_the_stored_step(grid, weight):
    codes, params = quantize(grid, weight)

    moved = (weight.double() - decode(grid, codes, params).double()).abs()

    step = per_weight(params["scales"].double(), weight)
    rounding = 2**grid.bits * EPS  # w/s + z and s * (q - z) are numbers of up to 2**bits steps, in fp32
    assert (moved <= step * (0.5 + rounding) + TINY).all()


@given(affine_grids, weights())
def test_the_stored_step_is_the_range_over_the_levels_rounded_up_by_one_place_at_most(grid, weight):
    params = grid.fit(weight)

    w = groups(weight, grid)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if grid.symmetric else high - low
    exact, step = span / (2**grid.bits - 1), params["scales"]
    below = torch.nextafter(step, torch.zeros_like(step)).double()
    assert weight.dtype == step.dtype
    assert (torch.where(span == 0, step.double() == 1, (below <= exact) & (exact * (1 - 1e-12) <= step.double()))).all()


def affine_by_hand(weight, bits, group_size, symmetric):
    """Codes, scales and zero points with the formula in exact fractions, one number at a time."""
    codes, scales, zeros = [], [], []
    for row in weight.tolist():
        for start in range(0, len(row), group_size):
            group = [Fraction(w) for w in row[start : start + group_size]]
            low, high = min(*group, Fraction(0)), max(*group, Fraction(0))
            span = 2 * max(-low, high) if symmetric else high - low
            scale = torch.tensor(float(span / (2**bits - 1)), dtype=torch.float64).to(weight.dtype)
            if Fraction(float(scale)) < span / (2**bits - 1):
                scale = torch.nextafter(scale, torch.tensor(math.inf, dtype=weight.dtype))
            s = Fraction(float(scale)) or Fraction(1)
            z = 2 ** (bits - 1) if symmetric else min(max(round(-low / s), 0), 2**bits - 1)
            codes += [min(max(round(w / s + z), 0), 2**bits - 1) for w in group]
            scales.append(float(s))
            zeros.append(z)
    return codes, scales, zeros


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_affine_codes_scales_and_zero_points_equal_a_loop_over_exact_fractions(bits, symmetric, dtype):
    weight = gaussian(6, 64, seed=bits, dtype=dtype)
    weight[0], weight[1], weight[2] = 0, 0.5, weight[2].abs() + 1
    grid = AffineGrid(bits=bits, group_size=16, symmetric=symmetric)

    codes, params = quantize(grid, weight)

    expected_codes, expected_scales, expected_zeros = affine_by_hand(weight, bits, 16, symmetric)
    assert expected_scales == params["scales"].flatten().tolist()
    assert expected_zeros == grid.expand(params, 6, 64)[1].flatten().tolist()
    scale, zero = (torch.tensor(v, dtype=torch.float64).view(6, 4) for v in (expected_scales, expected_zeros))
    place = weight.double() / per_weight(scale, weight) + per_weight(zero, weight)
    tie = ((place % 1) - 0.5).abs() <= 2**bits * EPS  # the fp32 quotient may fall on either side
    assert torch.equal(torch.tensor(expected_codes).view(6, 64)[~tie], codes[~tie].long())
    assert ((place - codes).abs()[tie] <= 0.5 + 2**bits * EPS).all()


@given(weights())
def test_symmetric_affine_stores_no_zero_points_and_asymmetric_as_many_bits_as_a_code(weight):
    for bits in BITS:
        symmetric = AffineGrid(bits=bits, group_size=16, symmetric=True).fit(weight)
        asymmetric = AffineGrid(bits=bits, group_size=16, symmetric=False).fit(weight)

        assert {"scales"} == symmetric.keys()
        assert (len(weight), math.ceil(4 * bits / 8)) == asymmetric["zero_points"].shape
        assert (unpack(asymmetric["zero_points"], bits, 4).int() < 2**bits).all()


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_the_largest_numbers_of_fp32_are_rounded_like_any_others(symmetric):
    weight = torch.tensor([[-3.4e38, -1.0e38, 0, 1.0e38, 2.0e38, 3.0e38, 3.3e38, 3.4e38]])
    grid = AffineGrid(bits=8, group_size=8, symmetric=symmetric)

    moved = (weight.double() - decode(grid, *quantize(grid, weight)).double()).abs()

    assert float(moved.max()) <= 6.8e38 / 255 / 2 * 1.0001


def test_a_range_beyond_the_dtype_is_refused_rather_than_clipped():
    huge = torch.full((1, 8), 65504.0, dtype=torch.float16)
    huge[0, 0] = -65504
    grid = AffineGrid(bits=1, group_size=8, symmetric=True)  # one step over the whole range: 131008

    with pytest.raises(LayerError, match=r"exceeds torch\.float16"):
        grid.fit(huge)


# --- NF4 --------------------------------------------------------------------------------------------------------------


def half_gaps(codes):
    """Half the distance from each level to its farther neighbour."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    gap = levels.diff() / 2
    return torch.maximum(torch.cat([gap[:1], gap]), torch.cat([gap, gap[-1:]]))[codes.long()]


@given(nf4_grids, weights())
def test_nf4_moves_a_weight_by_half_the_gap_of_its_level_and_the_error_of_the_stored_absmax(grid, weight):
    codes, params = quantize(grid, weight)
    exact = groups(weight, grid).abs().amax(-1).clamp(min=SMALLEST_ABSMAX)

    moved = (weight.double() - decode(grid, codes, params).double()).abs()

    stored = grid.expand(params, *weight.shape)[0].double()
    level = torch.tensor(NF4_LEVELS, dtype=torch.float64)[codes.long()].abs()
    bound = half_gaps(codes) * per_weight(exact, weight) + level * per_weight((stored - exact).abs(), weight)
    assert (moved <= bound + per_weight(exact, weight) * 4 * EPS + per_weight(stored.abs(), weight) * EPS + TINY).all()


@given(nf4_grids, weights())
def test_nf4_codes_are_those_of_the_nearest_level(grid, weight):
    codes, _ = quantize(grid, weight)

    absmax = per_weight(groups(weight, grid).abs().amax(-1).clamp(min=SMALLEST_ABSMAX), weight)
    unit = weight.double() / absmax
    distances = (unit[..., None] - torch.tensor(NF4_LEVELS, dtype=torch.float64)).abs()
    taken = distances.gather(-1, codes.long()[..., None])[..., 0]
    assert (taken <= distances.amin(-1) + 4 * EPS).all()


def test_without_double_quantization_nf4_stores_the_absmax_as_it_is():
    weight = gaussian(4, 128)

    params = NF4Grid(double_quant=False).fit(weight)

    assert torch.equal(weight.view(-1, 64).abs().amax(-1), params["absmax"])


def test_nf4_refuses_what_its_mean_of_absmax_cannot_hold():
    with pytest.raises(LayerError, match=r"exceeds fp32: the largest is 3\.0"):
        NF4Grid().fit(torch.full((4, 64), 3e38))


@given(weights(max_rows=40))
def test_a_double_quantized_absmax_is_off_by_half_a_gap_of_the_8_bit_levels(weight):
    grid = NF4Grid()
    params = grid.fit(weight)

    exact = groups(weight, grid).abs().amax(-1).flatten()
    offset = params["absmax_offset"].double()
    scale = params["absmax_scales"].double().repeat_interleave(DOUBLE_QUANT_BLOCK)[: exact.numel()]
    widest = float(dynamic_levels().double().diff().max()) / 2
    lowest = 1 + float(dynamic_levels()[0])  # levels start above -1
    error = (grid.expand(params, *weight.shape)[0].flatten().double() - exact).abs()
    assert (error <= scale * max(widest, lowest) + 8 * EPS * (exact + offset.abs()) + 2 * SMALLEST_ABSMAX).all()


# --- LLM.int8() -------------------------------------------------------------------------------------------------------


@given(weights())
def test_int8_rows_move_no_weight_by_more_than_half_a_step_of_absmax_over_127(weight):
    grid = Int8RowGrid()
    codes, params = quantize(grid, weight)

    step = weight.double().abs().amax(-1, keepdim=True) / 127
    moved = (weight.double() - decode(grid, codes, params).double()).abs()
    near_zero = 127 * TINY  # where the step itself is rounded to a whole number of the smallest numbers
    assert (moved <= step * (0.5 + 256 * EPS) + near_zero).all()
    assert (codes >= 1).all(), "the code -128 of two's complement is not used"


# --- All --------------------------------------------------------------------------------------------------------------


@given(grids, weights())
def test_a_weight_of_zero_decodes_to_exactly_zero(grid, weight):
    codes, params = quantize(grid, weight)

    assert (decode(grid, codes, params)[weight == 0] == 0).all()


@given(grids, weights())
def test_rounding_what_is_on_the_grid_already_changes_no_code(grid, weight):
    if isinstance(grid, NF4Grid):
        grid = NF4Grid(group_size=grid.group_size, double_quant=False)  # else the codes follow the exact absmax
    codes, params = quantize(grid, weight)
    decoded = decode(grid, codes, params)
    scales, _ = grid.expand(params, *weight.shape)

    again = grid.encode(decoded, params)

    normal = per_weight(scales, weight) >= torch.finfo(torch.float32).tiny  # below, s * q has no places left
    assert torch.equal(codes[normal], again[normal])


@given(grids, weights())
def test_parameters_have_the_shapes_and_dtypes_that_the_layer_reserves(grid, weight):
    params = grid.fit(weight)

    expected = grid.buffers(*weight.shape, weight.dtype)
    assert expected == {name: (tuple(value.shape), value.dtype) for name, value in params.items()}


@given(grids, weights())
def test_codes_fit_in_the_bits_of_the_grid_and_index_its_table(grid, weight):
    codes, _ = quantize(grid, weight)

    assert (torch.uint8, weight.shape) == (codes.dtype, codes.shape)
    assert 2**grid.bits == len(grid.table()) > int(codes.max())


@given(grids, weights())
def test_quantizing_leaves_the_weight_as_it_was(grid, weight):
    before = weight.clone()

    codes, params = quantize(grid, weight)
    decode(grid, codes, params)

    assert torch.equal(before, weight)


def stored_bits(grid, rows=256, cols=1024, dtype=torch.bfloat16):
    """Bits per weight of the parameters, without the codes."""
    sizes = grid.buffers(rows, cols, dtype).values()
    return 8 * sum(math.prod(shape) * kind.itemsize for shape, kind in sizes) / (rows * cols)


@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        (AffineGrid(bits=4, group_size=128, symmetric=True), 16 / 128),
        (AffineGrid(bits=4, group_size=128, symmetric=False), (16 + 4) / 128),
        (AffineGrid(bits=3, group_size=64, symmetric=False), (16 + 3) / 64),
        (AffineGrid(bits=2, group_size=32, symmetric=False), (16 + 2) / 32),
        (AffineGrid(bits=8, group_size=-1, symmetric=False), (16 + 8) / 1024),
        (NF4Grid(), 8 / 64 + 32 / (64 * 256) + 32 / (256 * 1024)),
        (NF4Grid(double_quant=False), 32 / 64),
        (Int8RowGrid(), 32 / 1024),
    ],
    ids=str,
)
def test_parameters_take_the_bits_that_the_formula_adds_up_to(grid, bits):
    assert bits == stored_bits(grid)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_on_average_over_gaussian_weights_every_bit_makes_the_error_smaller(symmetric):
    def error(bits):
        grid = AffineGrid(bits=bits, group_size=64, symmetric=symmetric)
        weights = [gaussian(16, 256, seed=seed) for seed in range(5)]
        return sum(float((w - decode(grid, *quantize(grid, w))).square().mean()) for w in weights)

    errors = [error(bits) for bits in BITS]

    assert errors == sorted(errors, reverse=True)
    assert all(worse > 2 * better for worse, better in itertools.pairwise(errors))


def test_nf4_is_better_than_an_even_grid_of_4_bits_on_gaussian_weights():
    weight = gaussian(64, 512)
    error = {
        grid: float((weight - decode(grid, *quantize(grid, weight))).square().mean())
        for grid in (NF4Grid(), AffineGrid(bits=4, group_size=64, symmetric=True))
    }
    nf4, even = error.values()

    assert nf4 < even


def test_a_group_that_does_not_divide_is_refused_with_the_divisors_near_it():
    with pytest.raises(LayerError, match="group_size=128 does not divide the 688 inputs of q_proj; divisors near it: "
                       "16, 43, 86, 172; group_size=-1"):  # fmt: skip
        check_group(688, 128, "q_proj")
    with pytest.raises(LayerError, match=r"divisors near it: 32, 64$"):
        check_group(192, 128, "q_proj", allowed=(32, 64, 128))
    with pytest.raises(LayerError, match="divisors near it: none"):
        check_group(7, 128, "q_proj")
    check_group(688, 43)
    check_group(688, -1)


# --- bitsandbytes as oracle -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is the oracle")


def test_the_levels_of_the_8_bit_type_equal_bitsandbytes_map(functional):
    assert torch.equal(functional.create_dynamic_map(), dynamic_levels())


def test_the_nf4_levels_equal_those_of_bitsandbytes(functional):
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), NF4Grid().table())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 256])
@given(seed=seeds)
def test_nf4_stores_what_bitsandbytes_stores(functional, dtype, group_size, seed):
    weight = gaussian(48, 512, seed=seed, dtype=dtype)
    weight[3, :256] = 0

    ours, params = quantize(NF4Grid(group_size=group_size), weight)
    packed, theirs = functional.quantize_4bit(weight, blocksize=group_size, compress_statistics=True, quant_type="nf4")

    assert torch.equal(packed.view(48, -1), ours[:, ::2] << 4 | ours[:, 1::2])
    assert torch.equal(theirs.offset, params["absmax_offset"])
    assert torch.equal(theirs.state2.absmax, params["absmax_scales"])
    assert_levels_are_as_near(weight.float().view(-1, group_size).abs().amax(-1), theirs, params)


def assert_levels_are_as_near(absmax, theirs, params):
    """Ours is the nearest 8-bit level. On CPU bitsandbytes rounds through a table of 2**16 cells: its own may be the
    second nearest, by less than a cell."""
    levels = dynamic_levels().double()
    scale = theirs.state2.absmax.double().repeat_interleave(DOUBLE_QUANT_BLOCK)[: absmax.numel()]
    unit = (absmax - theirs.offset).double() / scale
    ours = (levels[params["absmax_codes"].long()] - unit).abs()
    other = (levels[theirs.absmax.long()] - unit).abs()
    assert (ours <= (levels - unit[:, None]).abs().amin(-1) + 4 * EPS).all()
    assert (other <= ours + 2 / 2**16).all()


@given(seed=seeds)
def test_int8_rows_equal_those_of_bitsandbytes_in_fp16(functional, seed):
    weight = gaussian(24, 256, seed=seed, dtype=torch.float16)

    ours, params = quantize(Int8RowGrid(), weight)
    theirs, absmax, _ = functional.int8_vectorwise_quant(weight)

    assert torch.equal(absmax, params["absmax"])
    assert torch.equal(theirs, (ours ^ 0x80).view(torch.int8))


# --- Floating point ---------------------------------------------------------------------------------------------------


FLOATS = [FloatGrid(element=element, group_size=size, scale=scale) for element in ("e4m3", "e5m2", "e2m1")
          for size, scale in ((16, "e4m3"), (32, "e8m0"), (16, "float"), (-1, "float"))]  # fmt: skip


def by_hand(element, code):
    """The value of a code, from its sign, exponent and mantissa."""
    exponents, mantissas, bias = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15), "e2m1": (2, 1, 1)}[element]
    sign = -1 if code >> (exponents + mantissas) else 1
    exponent, mantissa = (code >> mantissas) % 2**exponents, code % 2**mantissas
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissas)
    return sign * (1 + mantissa / 2**mantissas) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("element", ["e4m3", "e5m2", "e2m1"])
def test_the_table_of_a_floating_point_type_is_what_its_bits_say(element):
    table = FloatGrid(element=element, group_size=-1).table()

    for code, value in enumerate(table.tolist()):
        if code % 128 >= {"e4m3": 127, "e5m2": 124, "e2m1": 128}[element]:
            assert not math.isfinite(value)
        else:
            assert by_hand(element, code) == value


@given(st.sampled_from(FLOATS), weights())
def test_a_code_of_a_floating_point_type_is_the_nearest_there_is(grid, weight):
    codes, params = quantize(grid, weight)
    scales, _ = grid.expand(params, *weight.shape)
    table, scales = grid.table(), per_weight(scales, weight)
    table = torch.where(table.isfinite(), table, math.inf)

    off = ((weight.float() / scales)[..., None] - table).abs()

    # in float32, as the quotient is: two levels may then be equally near
    assert torch.equal(off.amin(-1), off.gather(-1, codes.long()[..., None])[..., 0])


@given(st.sampled_from(FLOATS), weights())
def test_scales_of_a_floating_point_grid_are_finite_above_zero_and_clip_little(grid, weight):
    params = grid.fit(weight)
    scales, _ = grid.expand(params, *weight.shape)

    assert torch.isfinite(scales).all() and (scales > 0).all()
    if float(params.get("divisor", 0)) == torch.finfo(torch.float32).max:
        return  # of weights below 1e-35, whose scales cannot have all of their bits
    largest = weight.float().abs().view(weight.shape[0], scales.shape[1], -1).amax(-1)
    reach = scales * {"e4m3": 448, "e5m2": 57344, "e2m1": 6}[grid.element]
    # MX may cut 8 steps to 6, of E5M2 to 7; E4M3 has 3 bits of mantissa; scales of the weight's dtype are rounded up
    slack = {"e8m0": 8 / 6, "e4m3": 1 + 2**-4, "float": 1.0}[grid.scale]
    assert (largest <= reach * slack * (1 + 4 * EPS)).all()


@given(st.integers(0, 2**31), st.sampled_from((16, 32)))
def test_nvfp4_holds_what_it_holds_again(seed, size):
    grid = FloatGrid(element="e2m1", group_size=size, scale="e4m3")
    weight = decode(grid, *quantize(grid, gaussian(4, 64, seed=seed)))

    codes, params = quantize(grid, weight)

    assert torch.allclose(weight, decode(grid, codes, params), rtol=2**-3, atol=0)


def test_nan_is_no_code_and_no_scale():
    grid = FloatGrid(element="e4m3", group_size=-1)
    with pytest.raises(LayerError, match="no number in E4M3"):
        grid.check(torch.tensor([[0x7F]], dtype=torch.uint8), {"scales": torch.ones(1, 1)}, 1)
    grid = FloatGrid(element="e2m1", group_size=32, scale="e8m0")
    with pytest.raises(LayerError, match="finite and above 0"):
        grid.check(torch.zeros(1, 16, dtype=torch.uint8), {"scales": torch.full((1, 1), 255, dtype=torch.uint8)}, 32)
    grid = FloatGrid(element="e2m1", group_size=16, scale="e4m3")
    with pytest.raises(LayerError, match="finite and above 0"):
        params = {"scales": torch.zeros(1, 2, dtype=torch.uint8), "divisor": torch.tensor(1.0)}
        grid.check(torch.zeros(1, 16, dtype=torch.uint8), params, 32)


@pytest.mark.parametrize("setting", [{"element": "e3m4"}, {"scale": "e5m2"}, {"group_size": 0}])
def test_a_floating_point_grid_of_no_kind_is_refused(setting):
    with pytest.raises(LayerError, match=next(iter(setting))):
        FloatGrid(**{"element": "e4m3", "group_size": 16} | setting)
