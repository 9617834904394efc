"""Fine-tuning of what `p` leaves: all weights, on the loss of the text, and no packed ones."""

import copy

import pytest
import torch
from cut_models import NF4, folders, opened  # noqa: F401

import compression
from compression import LayerError, Recipe
from compression.engine.shapes import outcome

CUT = "p(round_to=32,samples=4)"
TUNED = "p(round_to=32,samples=4,finetune_samples=16)"


def test_fine_tuning_trains_all_that_is_left_on_the_loss_of_the_text(tmp_path):
    from compression.training.settings import Objective, Settings
    from compression.training.trainer import train

    ids, base = torch.randint(300, (20, 12), generator=torch.Generator().manual_seed(3)), opened()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    wanted = copy.deepcopy(compression.compress(base, CUT, calibration=ids).model)
    result = compression.compress(base, TUNED, calibration=ids, cache=tmp_path / "cache")

    settings = Settings(epochs=2, learning_rate=5e-5, batch=2, accumulation=4, clip=1.0)
    cut = {name: tensor.clone() for name, tensor in wanted.state_dict().items()}
    train(wanted, ids[:16], Objective(alpha=0, temperature=1), settings, tmp_path / "runs")
    found = result.model.state_dict()
    torch.testing.assert_close(wanted.state_dict(), found, rtol=0, atol=0)
    assert {name for name in cut if not torch.equal(cut[name], found[name])} == cut.keys()
    torch.testing.assert_close(before, base.model.state_dict(), rtol=0, atol=0)
    assert 2 * 16 * 12 == result.cost.trained_tokens
    assert {"replaced"} == {entry.outcome for entry in result.report}
    assert all("4 steps over 384 tokens" in entry.detail for entry in result.report)


def test_packed_weights_are_not_fine_tuned_which_is_said_before_any_work():
    with pytest.raises(
        LayerError, match=r"trains all weights, and those of model\.layers\.0\.self_attn\.q_proj are pack"
    ):
        outcome(Recipe.parse(f"{NF4}-{TUNED}"), opened().model)
    outcome(Recipe.parse(f"{TUNED}-{NF4}"), opened().model)
