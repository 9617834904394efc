"""Plans: what a recipe takes on a base, settled once and before any weight is read; `plan` makes one.

Whoever runs a recipe, streams it, estimates it or benches it reads the same value. Texts, tasks and teachers are opened
once for any number of recipes (`Planner`), and each recipe is scheduled and checked once.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from compression.architectures import decoder
from compression.calibration.text import WAYS_OUT, Calibration, open_calibration
from compression.checkpoints import base as _checkpoint
from compression.checkpoints.base import Base, BaseSource
from compression.checkpoints.formats import registry as formats
from compression.checkpoints.formats import writing
from compression.checkpoints.size import stored_bytes
from compression.engine import shapes
from compression.engine.schedule import Schedule, is_whole, make_schedule
from compression.errors import CalibrationError, CompressionError, RecipeError, TeacherError, TrainingError
from compression.methods.base import Quantizer
from compression.recipes.recipe import Recipe
from compression.training import downstream as _downstream
from compression.training.downstream import Downstream, open_downstream
from compression.training.vocabulary import shared_vocabulary


@dataclass(frozen=True, eq=False)
class Plan:
    """What compressing a base by a recipe takes.

    Attributes:
        recipe: what is done.
        source: the base, its files on disk.
        schedule: the steps as they are run, those included that have to stand between them.
        base: the model of the base, without weights.
        outcome: the model that the recipe makes, without weights, as far as shapes tell what it stores.
        calibration: the text that steps read; None if none does.
        downstream: the task that steps recover on; None if none does.
        teacher: the base that steps learn from, its files on disk and its tokenizer compared; None if none does.
    """

    recipe: Recipe
    source: BaseSource
    schedule: Schedule
    base: nn.Module = field(repr=False)
    outcome: nn.Module = field(repr=False)
    calibration: Calibration | None = None
    downstream: Downstream | None = None
    teacher: BaseSource | None = None

    @property
    def executed(self) -> tuple[str, ...]:
        """The steps as they are run, as text."""
        return tuple(what for _, what in self.schedule)

    @property
    def trains(self) -> bool:
        """Whether a step trains."""
        return any(step.method.trains for step in self.recipe.steps)

    @property
    def whole_model(self) -> str | None:
        """Why the recipe cannot be run block by block, in words; None if it can."""
        steps = [str(step) for step in self.recipe.steps if is_whole(step)]
        return f"{steps[0]} works on the whole model at once" if steps else None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors that the result stores, as far as shapes tell."""
        return stored_bytes(self.outcome)

    @property
    def base_bytes(self) -> int:
        """Bytes of all tensors of the base, in the dtype that the plan was made in."""
        return stored_bytes(self.base)

    def kernels(self, device: str) -> dict[str, int]:
        """How many layers of the result get which kernel on a device, as far as shapes tell."""
        return dict(Counter(layer.kernel_name(device) for layer in decoder.stored_layers(self.outcome).values()))

    def check_format(self, format: str) -> None:
        """Refuse a published format that cannot hold what the recipe packs at its end, as far as shapes tell.

        Raises:
            LayerError: it cannot.
        """
        formats.find(format).check_tokenizer(self.source.tokenizer, self.base.config)
        writing.check_cache(format, self.outcome)
        if self.schedule and isinstance(getattr(self.schedule[-1][0], "method", None), Quantizer):
            formats.find(format).check_shapes(self.outcome)


def plan(
    base: Base | BaseSource | str,
    recipe: Recipe | str,
    *,
    calibration: Any = None,
    downstream: Any = None,
    teacher: str | BaseSource | None = None,
) -> Plan:
    """What compressing a base by a recipe takes; reads texts and shapes, and no weights.

    Args:
        base: an opened base, what was located, or the text of one, which is fetched if need be.
        recipe: an instance or its text.
        calibration, downstream, teacher: as for `compress`.

    Raises:
        RecipeError: the recipe cannot be.
        CheckpointError: the base or the teacher cannot be opened.
        LayerError: a layer cannot be taken, and its shape is the reason.
        CalibrationError: a method needs calibration text, and there is none, or nothing is called as what was given.
        TeacherError: a method needs a teacher, and there is none, or its tokenizer is not that of the base.
        TrainingError: a method needs a downstream task, and there is none, or nothing is called as what was given.
    """
    parsed = Recipe.parse(recipe)
    return Planner(base, calibration=calibration, downstream=downstream, teacher=teacher).plan(parsed)


class Planner:
    """Plans any number of recipes on one base: what they read is opened once.

    Args:
        base: as for `plan`.
        calibration, downstream, teacher: as for `compress`, or what was opened.
        dtype: of the weights of the base, for the bytes of plans; None for the one that they are stored in, which the
            headers of its files tell. That of an opened base is its own.

    Raises:
        CheckpointError, CalibrationError, TrainingError: base, text or task cannot be opened.
    """

    def __init__(
        self,
        base: Base | BaseSource | str,
        *,
        calibration: Any = None,
        downstream: Any = None,
        teacher: str | BaseSource | None = None,
        dtype: torch.dtype | None = torch.bfloat16,
    ):
        self._opened = base.model if isinstance(base, Base) else None
        located = base.source if isinstance(base, Base) else base
        self.source = (_checkpoint.locate(located) if isinstance(located, str) else located).fetch()
        self.calibration = open_calibration(calibration, self.source)
        self.downstream = open_downstream(downstream, self.source)
        self._teacher, self._dtype = teacher or default_teacher(self.source), dtype
        self._compared: set[bool] = set()

    @cached_property
    def base(self) -> nn.Module:
        """The model of the base, without weights."""
        if self._opened is not None:
            return decoder.without_weights(self._opened)
        dtype = self.source.weights().dtype if self._dtype is None else self._dtype
        return _checkpoint.build(self.source.config, dtype, device="meta")

    @property
    def base_bytes(self) -> int:
        """Bytes of all tensors of the base, in `dtype`."""
        return stored_bytes(self.base)

    def plan(self, recipe: Recipe) -> Plan:
        """The plan of one recipe; raises as the function `plan`."""
        schedule = make_schedule(recipe.steps)
        return Plan(
            recipe=recipe, source=self.source, schedule=schedule, calibration=self._calibration_of(recipe),
            teacher=self._teacher_of(recipe), downstream=self._downstream_of(recipe), base=self.base,
            outcome=shapes.outcome(recipe, self.base, schedule),
        )  # fmt: skip

    def plan_all(self, recipes: Iterable[Recipe]) -> tuple[dict[str, Plan], dict[str, str]]:
        """The plans of recipes by their text, and why the others cannot be.

        Raises:
            CheckpointError: the base or the teacher cannot be opened, which no recipe could do anything about.
        """
        if isinstance(self._teacher, str) and self._teacher != "self":
            _checkpoint.locate(self._teacher)
        _ = self.base
        plans, refused = {}, {}
        for recipe in recipes:
            try:
                plans[recipe.text] = self.plan(recipe)
            except CompressionError as error:
                refused[recipe.text] = str(error)
        return plans, refused

    def _calibration_of(self, recipe: Recipe) -> Calibration | None:
        if not any(step.method.calibration for step in recipe.steps):
            return None
        if self.calibration is None:
            raise CalibrationError(
                f"{recipe.text} needs calibration text, and {self.source.label!r} brings none; {WAYS_OUT}"
            )
        return self.calibration

    def _downstream_of(self, recipe: Recipe) -> Downstream | None:
        if not any(step.method.downstream for step in recipe.steps):
            return None
        if self.downstream is None:
            raise TrainingError(f"{recipe.text} trains on a downstream task, and {self.source.label!r} brings none; "
                                f"{_downstream.WAYS_OUT}")  # fmt: skip
        return self.downstream

    def _teacher_of(self, recipe: Recipe) -> BaseSource | None:
        methods = [step.method for step in recipe.steps if step.method.teacher]
        if not methods:
            return None
        if self._teacher is None:
            raise TeacherError(
                f"{recipe.text} needs a teacher, and {self.source.label!r} brings none; give teacher (--teacher): a "
                "base of the same tokenizer, or self for the uncompressed base"
            )
        if self._teacher in ("self", self.source):
            return self.source
        for allowed in {method.allow_vocab_mismatch for method in methods} - self._compared:
            rows = (self.source.config["vocab_size"], self._fetched.config["vocab_size"])
            shared_vocabulary(
                self.source.tokenizer, self._fetched.tokenizer, rows, allow_vocab_mismatch=allowed
            )  # fmt: skip
            self._compared.add(allowed)
        return self._fetched

    @cached_property
    def _fetched(self) -> BaseSource:
        assert self._teacher is not None
        return (_checkpoint.locate(self._teacher) if isinstance(self._teacher, str) else self._teacher).fetch()


def default_teacher(source: BaseSource) -> str | None:
    """The teacher that a base brings."""
    return "reference-teacher" if source.text == "reference" else None


def taken(base: Base | BaseSource | str, recipe: Recipe | str | Plan, **given: Any) -> Plan:
    """The plan of a recipe on a base; one that was made is taken as it is.

    Raises:
        RecipeError: it is of another base, or the texts, task or teacher that it has are given once more.
    """
    if not isinstance(recipe, Plan):
        return plan(base, recipe, **given)
    source = base.source if isinstance(base, Base) else base
    text = source if isinstance(source, str) else source.text
    if text != recipe.source.text:
        raise RecipeError(f"the plan is of the base {recipe.source.text!r}, not of {text!r}; make one of this base")
    if more := [name for name, value in given.items() if value is not None]:
        raise RecipeError(f"{more[0]} is settled by the plan; give it to `plan`, not to `compress`")
    return recipe
