"""What a judge and other measures made of the answers of a model, by question."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import fsum
from typing import Any, Self

from bench.errors import MetricError, NotAvailable
from bench.results.items import Items


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Values of several metrics by question, 0 to 1, in the order of `hashes`; None where there is none.

    Attributes:
        by: name of the metric without its group, and its values.
        invalid: replies that could not be read, each with its reason.
        thinking: what was cut of the answers, in words.
        params: part of the key of the rows.
        refused: metrics that cannot be had of these answers, each with the reason.
    """

    hashes: tuple[str, ...]
    by: Mapping[str, tuple[float | None, ...]]
    invalid: tuple[str, ...] = ()
    empty: int = 0  # answers without a word
    thinking: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        """Over the questions that have a value. Raises MetricError where none has, NotAvailable for what is refused."""
        if name in self.refused:
            raise NotAvailable(self.refused[name])
        values = [value for value in self.by[name] if value is not None]
        if not values:
            why = f", the first because: {self.invalid[0]}" if self.invalid else ""
            raise MetricError(f"judge.{name}: none of {len(self.hashes)} answers has a value{why}")
        return fsum(values) / len(values)

    def beside(self, other: Self) -> tuple[Self, Self]:
        """Both without the questions that one of them has no value for; a value is then of the same questions."""
        kept = {
            name: [one is not None and two is not None for one, two in zip(mine, other.by[name], strict=True)]
            for name, mine in self.by.items()
        }

        def only(scores: Self) -> Self:
            by = {
                name: tuple(value if keep else None for value, keep in zip(values, kept[name], strict=True))
                for name, values in scores.by.items()
            }
            return replace(scores, by=by)

        return only(self), only(other)

    @property
    def items(self) -> Mapping[str, Items]:
        """By metric, for paired comparisons."""
        found = {}
        for name, values in self.by.items():
            pairs = [(hash_, value) for hash_, value in zip(self.hashes, values, strict=True) if value is not None]
            if pairs and name not in self.refused:
                found[f"judge.{name}"] = Items(*zip(*pairs, strict=True), "real")
        return found

    @property
    def remark(self) -> str | None:
        """What a reader of the values must know, or None."""
        said = [self.thinking] if self.thinking else []
        if self.invalid:
            said.append(f"{len(self.invalid)} replies of the judge were no verdict, such as {self.invalid[0]}")
        kept = {name: values for name, values in self.by.items() if name not in self.refused}
        if count := max((sum(value is None for value in values) for values in kept.values()), default=0):
            said.append(f"up to {count} of {len(self.hashes)} questions are left out, here and of the base")
        return "; ".join(said) or None
