"""hqq against the library of that name: refused with words without it, compared with it where it is installed."""

import re
import sys

import pytest
import torch
from strategies import gaussian

from compression import BackendError, RecipeError
from compression.errors import install_command
from compression.numeric.grids import AffineGrid
from compression.numeric.half_quadratic import half_quadratic
from compression.recipes.recipe import Recipe


@pytest.fixture
def hqq():
    return pytest.importorskip("hqq", reason=f"hqq is not installed: {install_command('hqq')}")


def method(text):
    return Recipe.parse(text).steps[0].method


def dequantized(recipe, weight):
    linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return method(recipe).compress_linear(linear, None).dequantize(torch.float32)


def test_without_the_library_the_way_out_is_named_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)

    with pytest.raises(BackendError, match=re.escape(install_command("hqq"))):
        method("hqq(backend=hqq)").check_layer(128, 128)


@pytest.mark.parametrize("parameter", ["norm=0.5", "beta=1.0", "kappa=1.1", "iterations=5"])
def test_what_the_library_does_not_take_is_refused(parameter):
    with pytest.raises(RecipeError, match="the hqq library takes"):
        method(f"hqq(backend=hqq,{parameter})")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_backend_stores_what_the_library_found(hqq, bits, group, dtype):
    from hqq.core.quantize import Quantizer

    weight = gaussian(48, 256, std=0.02).to(dtype)
    codes, meta = Quantizer.quantize(weight.float(), nbits=bits, group_size=None if group == -1 else group, axis=1,
                                     device="cpu", bitpack=False)  # fmt: skip
    scale, zero = (meta[name].to(dtype).float() for name in ("scale", "zero"))
    theirs = Quantizer.dequantize(codes, meta | {"scale": scale, "zero": zero, "compute_dtype": torch.float32})

    assert torch.equal(theirs, dequantized(f"hqq(bits={bits},group_size={group},backend=hqq)", weight))


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ours_and_the_library_agree_to_less_than_a_step_and_ours_is_no_worse(hqq, bits, group):
    weight = gaussian(64, 512, std=0.02)
    ours, theirs = (dequantized(f"hqq(bits={bits},group_size={group}{more})", weight) for more in ("", ",backend=hqq"))
    step = (
        AffineGrid(bits=bits, group_size=group, symmetric=False)
        .fit(weight)["scales"]
        .repeat_interleave(512 if group == -1 else group, 1)
    )

    assert ((ours - theirs).abs() <= step * 1.001).all()
    losses = [float((weight - q).abs().pow(0.7).sum()) for q in (ours, theirs)]
    assert losses[0] <= losses[1] * (1 + 1e-5)
    assert losses[1] < float(
        (weight - dequantized(f"rtn(bits={bits},group_size={group})", weight)).abs().pow(0.7).sum()
    )


def test_a_zero_point_that_is_off_by_one_would_be_seen(hqq):
    """The negative control: the bound above is one step, and a wrong zero point moves every weight by one."""
    weight = gaussian(64, 512, std=0.02)
    grid = AffineGrid(bits=4, group_size=64, symmetric=False, float_zeros=True)
    rounded = half_quadratic(weight, grid)
    rounded.params["zero_points"] += 1
    theirs = dequantized("hqq(backend=hqq)", weight)

    losses = [float((weight - q).abs().pow(0.7).sum()) for q in (rounded.decode(grid), theirs)]
    assert losses[0] > losses[1]
