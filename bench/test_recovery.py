"""Recovery: a compressed model before and after training on a downstream task, beside the same of the uncompressed."""

import pytest

from bench.metrics import recovery

pytestmark = pytest.mark.recovery


def test_recovery(workbench, recipe):
    before, after, _ = recovery.recipes_of(recipe)

    def take():
        points = {"before": _points(workbench, before), "after": _points(workbench, after)}
        return recovery.RecoveryReading(task=workbench.downstream, **points), None

    workbench.measure("recovery", recipe, take, compute_models=True)


def test_recovered_share(workbench, recipe):
    before, after, control = recovery.recipes_of(recipe)

    def take():
        points = {"before": before, "after": after, "control": control}
        reading = {name: _points(workbench, each) for name, each in points.items()}
        return recovery.ShareReading(task=workbench.downstream, **reading), None

    workbench.measure("recovery_share", recipe, take, compute_models=True)


def _points(workbench, recipe):
    """Of the model of a recipe; taken once."""

    def take():
        model = workbench.compute_model(workbench.compressed(recipe))
        return recovery.points(model, workbench.base.tokenizer, workbench.downstream)

    return workbench.base_reading(("recovery points", recipe), take)
