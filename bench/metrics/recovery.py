"""Recovery: what training on a downstream task gives a compressed model back ([E], phase 2).

The score on the task's held-out split before and after, over the same items; the difference is paired, item by item.
The control is the uncompressed model trained in the same way (`fp16-recover`). With b and a the scores of the
compressed model before and after, and c that of the control:

    share = (a - b) / (c - b)        of the gap to the control

1 where the control is not beaten and nothing is left of the gap; above 1 where the trained compressed model is better.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench._errors import NotAvailable, OptionError
from bench.metrics._registry import metric
from compression._recipe import Recipe

if TYPE_CHECKING:
    from compression._checkpoint import BaseSource

_Z = 1.96  # of a 95 % interval


@dataclass(frozen=True, kw_only=True)
class Points:
    """A model's points on the items of a task, each 0 to 1, and what tells the items apart."""

    task: str
    hashes: tuple[str, ...]  # 16 hex digits of sha256 of prompt and answer
    values: tuple[float, ...]

    @property
    def score(self) -> float:
        """Mean over the items."""
        return math.fsum(self.values) / len(self.values)

    @property
    def kind(self) -> str:
        """ "binary" where every item is right or wrong, else "real"."""
        return "binary" if set(self.values) <= {0.0, 1.0} else "real"


@dataclass(frozen=True, kw_only=True)
class RecoveryReading:
    """The points of one compressed model before and after, on the same items."""

    before: Points
    after: Points

    @property
    def differences(self) -> list[float]:
        """After minus before, item by item."""
        return [a - b for a, b in zip(self.after.values, self.before.values, strict=True)]

    @property
    def params(self) -> dict[str, Any]:
        """What belongs to the key of the rows."""
        return {"task": self.after.task, "items": len(self.after.values)}

    @property
    def items(self) -> Mapping[str, tuple[Sequence[str], Sequence[float], str]]:
        """Per-item results by metric: hashes, values, kind."""
        return {
            "recovery.score_before": (self.before.hashes, self.before.values, self.before.kind),
            "recovery.score_after": (self.after.hashes, self.after.values, self.after.kind),
        }


@dataclass(frozen=True, kw_only=True)
class ShareReading(RecoveryReading):
    """The same beside the control, trained on the same examples."""

    control: Points


def recipes_of(recipe: Recipe) -> tuple[Recipe, Recipe, Recipe]:
    """A recipe before recovery, after it, and its control; `recover` is put behind one that does not end with it."""
    steps = recipe.steps
    if not steps or steps[-1].name != "recover":
        steps += Recipe.parse("recover").steps
    return Recipe(steps[:-1]), Recipe(steps), Recipe(steps[-1:])


def points(model: Any, tokenizer: Any, task: str) -> Points:
    """Points of a model, as it is, on the held-out items of a task of the embedded reference."""
    from bench.reference import score, tasks

    items = tasks.items(task, "test")
    asked = [json.dumps([tasks.prompt(item), item["answer"]]) for item in items]
    hashes = tuple(hashlib.sha256(text.encode()).hexdigest()[:16] for text in asked)
    return Points(task=task, hashes=hashes, values=tuple(score.points(model, tokenizer, items)))


def check_task(task: str | None, source: "BaseSource") -> str:
    """The task that is measured: the one given, or the default of the base.

    Raises OptionError where none is given, or one without a held-out split that is scored.
    """
    from bench.reference import score
    from compression._downstream import DEFAULT

    scored = [name for name in score.SCORED if name != "perplexity"]
    found = task or (DEFAULT if source.kind == "named" else None)
    if found not in scored:
        raise OptionError(f"--downstream {found or 'was not given'}: -m recovery measures tasks of the embedded "
                          f"reference, which are {', '.join(scored)}")  # fmt: skip
    return found


@metric("recovery.score_before", unit="fraction", better="higher", kind="sampled", of="recovery", rel=0.03, floor=0.01)
def score_before(reading: RecoveryReading) -> float:
    """Score on the held-out split before recovery."""
    return reading.before.score


@metric("recovery.score_after", unit="fraction", better="higher", kind="sampled", of="recovery", rel=0.03, floor=0.01)
def score_after(reading: RecoveryReading) -> float:
    """Score on the held-out split after recovery."""
    return reading.after.score


@metric("recovery.gain", unit="fraction", better="higher", kind="sampled", of="recovery", rel=0.2, floor=0.03)
def gain(reading: RecoveryReading) -> float:
    """Mean over the items of what each has gained."""
    return math.fsum(reading.differences) / len(reading.differences)


@metric("recovery.gain_margin", unit="fraction", better="neither", kind="sampled", of="recovery", rel=0.5, floor=0.02)
def gain_margin(reading: RecoveryReading) -> float:
    """Half the 95 % interval of the gain: 1.96 standard errors of the paired differences."""
    n, mean = len(reading.differences), gain(reading)
    variance = math.fsum((d - mean) ** 2 for d in reading.differences) / max(n - 1, 1)
    return _Z * math.sqrt(variance / n)


@metric("recovery.share", unit="fraction", better="higher", kind="sampled", of="recovery_share", rel=0.2, floor=0.1)
def share(reading: ShareReading) -> float:
    """Share of the gap to the recovered uncompressed model that closes.

    Raises NotAvailable where the compressed model is not below that before recovery: there is no gap.

    >>> points = lambda *values: Points(task="t", hashes=("",) * len(values), values=values)
    >>> share(ShareReading(before=points(0, 0, 0, 1), after=points(1, 0, 1, 1), control=points(1, 1, 1, 1)))
    0.6666666666666666
    """
    before, after, control = (points.score for points in (reading.before, reading.after, reading.control))
    if control <= before:
        raise NotAvailable(
            f"no gap to close: the compressed model scores {before:.4f} before recovery, and the recovered "
            f"uncompressed one {control:.4f}"
        )
    return (after - before) / (control - before)
