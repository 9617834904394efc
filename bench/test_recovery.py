"""Recovery: a compressed model before and after training on a downstream task, beside the same of the uncompressed."""

import pytest

from bench.metrics import recovery

pytestmark = pytest.mark.recovery


def test_recovery(workbench, recipe):
    before, after, _ = recovery.recipes_of(recipe)

    def take():
        points = {each: _points(workbench, each) for each in (before, after)}
        return recovery.RecoveryReading(before=points[before], after=points[after]), None

    workbench.measure("recovery", recipe, take)


def test_recovered_share(workbench, recipe):
    before, after, control = recovery.recipes_of(recipe)

    def take():
        points = {each: _points(workbench, each) for each in (before, after, control)}
        reading = recovery.ShareReading(before=points[before], after=points[after], control=points[control])
        recovery.share(reading)  # which says so where there is none
        return reading, None

    workbench.measure("recovery_share", recipe, take)


def _points(workbench, recipe):
    """Of the model of a recipe; taken once."""

    def take():
        return recovery.points(workbench.compressed(recipe).model, workbench.base.tokenizer, workbench.downstream)

    return workbench.base_reading(("recovery points", recipe), take)
