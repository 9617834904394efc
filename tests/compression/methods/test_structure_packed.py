"""Packed layers cut smaller: rows and columns that stay keep their bits, and what is rounded again is told."""

import copy

import pytest
import torch
from cut_models import CUTS, NF4, assert_close, compressed, folders, logits, without  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import coded_linear, holds
from strategies import gaussian, seeds

import compression
from compression import LayerError
from compression.architectures.cuts import _tell
from compression.architectures.decoder import decoder_blocks
from compression.layers.codes import Codes
from compression.numeric.grids import AffineGrid, Int8RowGrid
from compression.numeric.grouping import quantize
from compression.numeric.normal_float import NF4Grid

GRIDS = (
    NF4Grid(group_size=32), NF4Grid(group_size=64), NF4Grid(group_size=64, double_quant=False), Int8RowGrid(),
    *(AffineGrid(bits=bits, group_size=size, symmetric=symmetric)
      for bits, size, symmetric in ((4, 64, False), (3, 32, False), (2, -1, False), (8, 64, True))),
    AffineGrid(bits=4, group_size=64, symmetric=False, float_zeros=True),
)  # fmt: skip
ROWS, COLS = 96, 256


def packed(grid, seed, *, permuted=False, bias=False):
    codes, params = quantize(grid, gaussian(ROWS, COLS, seed=seed) * (1 + torch.arange(ROWS)[:, None]))
    order = torch.randperm(COLS, generator=torch.Generator().manual_seed(seed)) if permuted else None
    return coded_linear(
        codes, params, torch.arange(ROWS).float() if bias else None, grid, dtype=torch.float32, permutation=order
    )


def check_rows(grid, seed, kept, permuted=False):
    layer = packed(grid, seed, permuted=permuted, bias=True)

    cut = layer.rows(torch.tensor(kept))

    assert torch.equal(layer.dequantize()[kept], cut.dequantize())
    assert torch.equal(layer.bias[kept], cut.bias)
    x = gaussian(3, COLS, std=1)
    torch.testing.assert_close(cut(x), layer.reference(x)[:, kept], rtol=1e-4, atol=2e-3)


subsets = st.lists(st.integers(0, ROWS - 1), min_size=1, unique=True).map(sorted)


@settings(max_examples=25)
@given(st.sampled_from(GRIDS), seeds, subsets | st.integers(1, ROWS).map(lambda n: list(range(n))), st.booleans())
def test_rows_of_a_packed_layer_keep_their_bits(grid, seed, kept, permuted):
    check_rows(grid, seed, kept, permuted)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_of_a_packed_layer_from_the_front_are_stored_as_before(grid):
    layer = packed(grid, 0)

    cut = layer.rows(torch.arange(64))

    assert grid == cut.weight_part.grid
    assert Codes(grid, 64, COLS, dtype=torch.float32).bytes == cut.stored_bytes


def test_the_law_catches_blocks_of_double_quantization_that_are_ignored(monkeypatch):
    """A negative control: scales of the blocks as they stood, over codes that moved."""

    def broken(self, params, places, size):
        flat = places.flatten()
        blocks = -(-len(flat) // 256)
        return self, params | {
            "absmax_codes": params["absmax_codes"][flat], "absmax_scales": params["absmax_scales"][:blocks]
        }  # fmt: skip

    kept = list(range(40, 96))
    check_rows(NF4Grid(group_size=32), 0, kept)
    monkeypatch.setattr(NF4Grid, "take", broken)
    with pytest.raises(AssertionError):
        check_rows(NF4Grid(group_size=32), 0, kept)


@settings(max_examples=25)
@given(st.sampled_from(GRIDS), seeds, st.sets(st.integers(0, 7), min_size=1), st.booleans())
def test_columns_that_fall_into_groups_keep_their_bits(grid, seed, blocks, permuted):
    layer = packed(grid, seed, permuted=permuted)
    columns = torch.cat([torch.arange(32) + 32 * block for block in sorted(blocks)])
    if permuted:  # blocks of what is stored
        columns = torch.sort(layer.weight_part.permutation[columns].long()).values

    cut = layer.columns(columns)

    assert "rounded again" not in _tell(layer, cut, columns)
    assert torch.equal(layer.dequantize()[:, columns], cut.dequantize())
    x = gaussian(3, COLS, std=1)
    alone = torch.zeros_like(x).index_copy(1, columns, x[:, columns])
    torch.testing.assert_close(cut(x[:, columns]), layer.reference(alone), rtol=1e-4, atol=2e-3)


@settings(max_examples=25)
@given(st.sampled_from(GRIDS), seeds, st.booleans())
def test_columns_that_do_not_are_rounded_on_their_own_grid_and_the_change_is_told(grid, seed, permuted):
    layer = packed(grid, seed, permuted=permuted)
    generator = torch.Generator().manual_seed(seed + 1)
    columns = torch.sort(torch.randperm(COLS, generator=generator)[:192]).values
    expected = layer.dequantize()[:, columns]

    cut = layer.columns(columns)
    told = _tell(layer, cut, columns)

    assert grid == cut.weight_part.grid
    change = float((cut.dequantize() - expected).norm() / expected.norm())
    assert ("rounded again" not in told) if change == 0.0 else f"which moved its weights by {change:.3g} of" in told
    assert 0.0 == change if grid.group_size == -1 else 0 < change < {2: 0.5, 3: 0.25, 4: 0.15, 8: 0.01}[grid.bits]


def test_columns_that_no_group_tiles_are_refused():
    with pytest.raises(LayerError, match="groups of 64 cannot be cut to tile the 200 inputs that are left"):
        packed(NF4Grid(), 0).columns(torch.arange(200))


PACKED = (
    CUTS[1],
    f"rtn(group_size=32)-{CUTS[0]}",
    f"gptq(group_size=32,static_groups=false,samples=4,sequence_length=12)-{CUTS[0]}",
    f"hqq(group_size=32)-{CUTS[2]}",
    f"{NF4}-{CUTS[2]}",
)


@pytest.mark.parametrize("text", PACKED)
def test_a_packed_model_is_cut_and_stays_packed(text, tmp_path):
    quantized = compressed("Qwen2ForCausalLM", text.split("-s")[0].split("-p")[0])
    result = compressed("Qwen2ForCausalLM", text)

    linears = [linear for block in decoder_blocks(result.model) for _, linear in block.linears()]
    assert 2 == len(result.executed)
    assert all(holds(linear, "codes") for linear in linears)
    assert result.stored_bytes < quantized.stored_bytes
    whole = copy.deepcopy(quantized.model)
    for block in decoder_blocks(whole):
        for name, linear in block.linears():
            block.replace(name, linear.to_linear())
    exact = not any("rounded again" in entry.detail for entry in result.report)
    assert exact == (CUTS[0] in text and "static_groups" not in text)
    if exact:
        assert_close(logits(result.model), logits(without(whole, layers=[1, 2], heads=[3])))
    opened_again = compression.load(result.save(tmp_path / "cut"))
    assert torch.equal(logits(opened_again.model), logits(result.model))
    assert result.stored_bytes == opened_again.stored_bytes
    assert result.report == opened_again.report


def test_a_step_that_edits_packed_weights_is_no_quantizer_and_cut_models_are_quantized():
    assert (NF4, CUTS[0]) == compressed("MistralForCausalLM", f"{NF4}-{CUTS[0]}").executed
    result = compressed("MistralForCausalLM", f"{CUTS[0]}-{NF4}")
    assert 21 == sum(result.kernels().values())
