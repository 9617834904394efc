"""What is run for the steps of a recipe, and in which order: with the steps that have to stand between them."""

from collections.abc import Iterable

from compression.recipes.recipe import Step

Schedule = tuple[tuple[Step | None, str], ...]  # what is run and how it is called; None makes stored layers dense


def make_schedule(steps: Iterable[Step]) -> Schedule:
    """The steps, `dequantize` (None) where one does not take a packed model, and the last undone quantizer again.

    The last entry of what is returned leaves the model packed if any step of the recipe did. Steps on layers make those
    that pruning did not store densely dense one by one; before a step on the whole model `densify` (None) does.
    """
    schedule: list[tuple[Step | None, str]] = []
    state, quantizer = "dense", None
    for step in steps:
        info = step.method.info
        if state == "packed" and "packed" not in info.takes:
            schedule.append((None, "dequantize"))
            state = "dense"
        if state == "sparse" and is_whole(step) and "sparse" not in info.takes and _stores(schedule[-1][0]):
            schedule.append((None, "densify"))
        schedule.append((step, str(step)))
        leaves = info.leaves or state
        if leaves == "packed" and state != "packed":  # a step that edits packed weights is no quantizer
            quantizer = step
        state = leaves
    if quantizer is not None and state != "packed":
        schedule.append((quantizer, str(quantizer)))
    return tuple(schedule)


def _stores(step: Step | None) -> bool:
    """Whether a pruning step stores a layer other than densely."""
    methods = [] if step is None else [step.method, *(override for _, override in step.layers)]
    return any(getattr(method, "store", "dense") != "dense" for method in methods)


def is_whole(step: Step | None) -> bool:
    """Whether a step needs the whole model at once."""
    return step is not None and step.method.unit in ("model", "training")
