"""Recovery: how much quality training on a downstream task restores ([E], phase 2).

The score on the task's held-out split before and after, over the same items; what was gained is compared item by item
(`statistics.paired`). The control is the uncompressed model trained in the same way (`fp16-recover`). With b and a the
scores of the compressed model before and after, and c that of the control:

    share = (a - b) / (c - b)        of the gap to the control

Above 1 the recovered compressed model is better than the control; of the control itself it is 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import measure, reference
from bench.errors import DataError, NotAvailable, OptionError
from bench.metrics.registry import metric
from bench.results.item_pairs import compare
from bench.results.items import Items, hashes_of
from compression import training
from compression.recipes.recipe import Recipe

if TYPE_CHECKING:
    from bench.statistics.paired import Difference
    from compression.checkpoints.base import BaseSource

DEFAULT = "fp16,nf4,sparsegpt,structured"  # recipes: a member of each family beside the control


@dataclass(frozen=True, kw_only=True)
class RecoveryReading:
    """The points of one model on the same items of a task before and after."""

    task: str
    before: Items
    after: Items

    @property
    def difference(self) -> "Difference":
        """After less before, paired."""
        return compare(self.after, self.before)

    @property
    def params(self) -> dict[str, Any]:
        """What belongs to the key of the rows."""
        return {"task": self.task, "items": len(self.after)}

    @property
    def items(self) -> Mapping[str, Items]:
        """Per-item results by name of the metric."""
        return {"recovery.score_before": self.before, "recovery.score_after": self.after}


@dataclass(frozen=True, kw_only=True)
class ShareReading:
    """The same beside the control, trained on the same examples."""

    task: str
    before: Items
    after: Items
    control: Items

    @property
    def params(self) -> dict[str, Any]:
        """What belongs to the key of the row."""
        return {"task": self.task, "items": len(self.after)}


@metric("recovery.score_before", unit="fraction", better="higher", kind="sampled", of="recovery", rel=0.03, floor=0.01)
def score_before(reading: RecoveryReading) -> float:
    """Score on the held-out split before recovery."""
    return reading.before.mean


@metric("recovery.score_after", unit="fraction", better="higher", kind="sampled", of="recovery", rel=0.03, floor=0.01)
def score_after(reading: RecoveryReading) -> float:
    """Score on the held-out split after recovery."""
    return reading.after.mean


@metric("recovery.gain", unit="fraction", better="higher", kind="sampled", of="recovery", rel=0.2, floor=0.03)
def gain(reading: RecoveryReading) -> float:
    """What an item has gained, the mean over all."""
    return reading.difference.difference


@metric("recovery.gain_low", unit="fraction", better="higher", kind="sampled", of="recovery", rel=0.2, floor=0.03)
def gain_low(reading: RecoveryReading) -> float:
    """Lower end of the gain's 95 % interval, paired: above 0 recovery is no chance."""
    return reading.difference.low


@metric("recovery.share", unit="fraction", better="higher", kind="sampled", of="recovery_share", rel=0.2, floor=0.1)
def share(reading: ShareReading) -> float:
    """Share of the gap to the recovered uncompressed model that closes.

    Raises NotAvailable where the control is not above the compressed model before recovery: there is no gap.

    >>> def points(*right):
    ...     return Items(hashes_of(range(4)), right, "binary")
    >>> share(ShareReading(
    ...     task="t", before=points(0, 0, 0, 1), after=points(1, 0, 1, 1), control=points(1, 1, 1, 1)))
    0.6666666666666666
    """
    before, after, control = (points.mean for points in (reading.before, reading.after, reading.control))
    if control <= before:
        raise NotAvailable(
            f"no gap to close: the model scores {before:.4f} before recovery, and the recovered uncompressed one "
            f"{control:.4f}"
        )
    return (after - before) / (control - before)


def recipes_of(recipe: Recipe) -> tuple[Recipe, Recipe, Recipe]:
    """A recipe before recovery, after it, and its control; `recover` is put behind one that does not end with it."""
    steps = recipe.steps
    if not steps or steps[-1].name != "recover":
        steps += Recipe.parse("recover").steps
    return Recipe(steps[:-1]), Recipe(steps), Recipe(steps[-1:])


def points(model: Any, tokenizer: Any, task: str) -> Items:
    """Points of a model, as it is, on the held-out items of a task of the embedded reference.

    Raises DataError: there is no tokenizer.
    """
    if tokenizer is None:
        raise DataError(f"the base has no tokenizer: the task {task} needs tokenizer.json beside the weights")
    asked = reference.tasks.items(task, "test")
    kind = "real" if task in ("rag", "no_rag") else "binary"
    return Items(hashes_of(map(_asks, asked)), tuple(measure.reference_scores.points(model, tokenizer, asked)), kind)


def _asks(item: Mapping[str, Any]) -> list[Any]:
    return [reference.tasks.prompt(item), *(item.get(key) for key in ("choices", "answer", "tests"))]  # type: ignore[arg-type]


def check_task(task: str | None, source: "BaseSource") -> str:
    """The task that is measured: the one given, or the default of the base.

    Raises OptionError where none is given, or one without a held-out split that is scored.
    """
    scored = [name for name in measure.reference_scores.SCORED if name != "perplexity"]
    found = task or (training.downstream.DEFAULT if source.shipped else None)
    if found not in scored:
        raise OptionError(f"--downstream {found or 'was not given'}: -m recovery measures tasks of the embedded "
                          f"reference, which are {', '.join(scored)}")  # fmt: skip
    return found
