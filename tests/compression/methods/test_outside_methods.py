"""Methods of other packages: announced as entry points of the group `compression.methods`, they are like those here."""

import importlib
import sys

import pytest
import torch
from checkpoints import logits
from small_runs import make_base, one_run

import compression
from compression import Recipe, RecipeError
from compression.__main__ import main
from compression.recipes import registry

METHOD = '''
"""Weights with fewer digits."""
from typing import Literal

from compression.methods.base import LayerMethod, method


@method("coarse", leaves="dense", paper="nowhere", family="quantization")
class Coarse(LayerMethod):
    """Rounds weights to multiples of a step."""

    step: float = 0.01  # between two weights
    leave: Literal["bias", "nothing"] = "bias"

    def compress_linear(self, linear, context):
        import torch

        coarse = torch.nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        coarse.weight = torch.nn.Parameter((linear.weight / self.step).round() * self.step, requires_grad=False)
        coarse.bias = linear.bias
        return coarse
'''


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Install a package: a folder of packages with what an installer writes beside it."""
    folder = tmp_path / "site"

    def install(package, source, announced):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("")
        (folder / package / "methods.py").write_text(source)
        facts = folder / f"{package}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[compression.methods]\n{announced}\n")
        importlib.invalidate_caches()

    before, aliases = dict(registry.discover()), dict(registry._ALIASES)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(registry, "_discovered", False)
    yield install
    registry.METHODS.clear()
    registry.METHODS.update(before)
    registry._ALIASES.clear()
    registry._ALIASES.update(aliases)
    for name in [name for name in sys.modules if name.split(".")[0] in ("outside", "broken")]:
        del sys.modules[name]


@pytest.fixture
def outside(site):
    site("outside", METHOD, "coarse = outside.methods")


def test_it_is_found_and_listed_with_its_parameters(outside, capsys):
    assert "outside.methods" == compression.list_methods()["coarse"].__module__

    assert 0 == main(["list"])

    told = capsys.readouterr().out
    assert "coarse (quantization): Rounds weights to multiples of a step." in told
    assert "step=0.01, leave=bias (bias|nothing)" in told


def test_recipes_check_its_parameters_and_name_near_misses(outside):
    assert "coarse(step=0.5)" == Recipe.parse("coarse(step=0.5)").text
    with pytest.raises(RecipeError, match="did you mean coarse"):
        Recipe.parse("coarce")
    with pytest.raises(RecipeError, match="allowed are bias, nothing"):
        Recipe.parse("coarse(leave=all)")


def test_it_is_run_streamed_saved_and_opened_again(outside, folder, tmp_path):
    result = compression.compress(str(folder), "coarse(step=0.125)-rtn(group_size=32)")

    opened = compression.load(result.save(tmp_path / "saved"))
    streamed = compression.load(compression.compress_to(tmp_path / "streamed", str(folder), result.recipe))
    assert torch.equal(logits(result.model), logits(opened.model))
    assert torch.equal(logits(result.model), logits(streamed.model))
    alone = compression.compress(str(folder), "coarse(step=0.125)").model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(alone * 8, (alone * 8).round())


def test_it_is_measured_and_gated(outside, tmp_path):
    make_base(tmp_path)
    one_run(tmp_path, "coarse(step=0.5)", update=True)

    sound = one_run(tmp_path, "coarse(step=0.5)", gate="strict")

    assert [] == sound.failing
    registry.METHODS["coarse"].compress_linear = lambda self, linear, context: linear
    assert any("regressed" in words or "improved" in words for words in one_run(tmp_path, "coarse(step=0.5)").failing)


def test_a_package_that_cannot_be_imported_is_named(site):
    site("broken", "import a_library_that_is_not_there\n", "odd = broken.methods")

    with pytest.raises(RecipeError, match=r"broken announces the method odd = broken\.methods.*uninstall broken"):
        compression.list_methods()
