"""The models of a run: the base, opened once, and one compressed model at a time."""

import functools
import gc
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compression
from bench.errors import NotAvailable
from bench.measure.generation import Decoder, Interleaved, Load
from bench.results import layers
from bench.session.compute import ComputeModels
from compression import UNCOMPRESSED, CompressionError, Recipe
from compression.checkpoints import formats

if TYPE_CHECKING:
    from torch import nn

    from bench.session.options import Options
    from compression import Base, BaseSource, Compressed, Plan, Planner, StepCache


def plans_of(planner: "Planner", recipes: Sequence[Recipe], *, named: bool) -> "tuple[dict[str, Plan], dict[str, str]]":
    """The plans of recipes by their text, and why the others have none; of what an engine does, of what it is given.

    Raises:
        CompressionError: a recipe that is not of a named list cannot be.
    """
    if named:
        return planner.plan_all(recipes)
    exported = dict.fromkeys(recipe.exported for recipe in recipes if recipe.exported.steps or not recipe.steps)
    plans = {recipe.text: planner.plan(recipe) for recipe in exported}
    return plans, planner.plan_all([recipe for recipe in recipes if recipe.on_load])[1]


class Models:
    """Base and compressed model in memory, and on disk for processes that open the latter by themselves.

    Attributes:
        kernels: for each recipe that was compressed how many layers have which kernel.
        steps: what was executed for it, and the seconds of each step.
        layers: what became of its layers (`bench.results.layers`), until that is in the journal.
        plans: of each recipe that is compressed here, by its text; made once, before anything is measured.
        refused: why a recipe of a named list cannot be, by its text.
        calibration, teacher, downstream_task: what recipes read, as `compression.compress` takes it.
        notes: for each recipe what a reader of its results has to know, as sentences.
    """

    plans: "Mapping[str, Plan]"
    refused: Mapping[str, str]
    calibration: Any
    teacher: Any
    downstream_task: Any

    def __init__(self, options: "Options", source: "BaseSource", progress: Callable[[int, int, str], None] | None):
        self.options, self.source, self._progress = options, source, progress
        self.kernels: dict[str, dict[str, int]] = {}
        self.steps: dict[str, tuple[tuple[str, float], ...]] = {}
        self.layers: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, tuple[str, ...]] = {}
        self._base: Base | None = None
        self._compressed: tuple[Recipe, Compressed | BaseException] | None = None
        self._folder: Path | None = None

    def make_plans(self) -> None:
        """Plan every recipe of the run: sets `plans` and `refused`.

        Raises:
            CompressionError: a recipe that is not of a named list cannot be, or what all of them read cannot be opened.
        """
        options = self.options
        recipes = [each for each in (*options.recipes, *options.derived) if each.text not in options.refused]
        if self.source.published is not None:
            self.plans, refused = {}, self._unlike_published()
        else:
            planner = compression.Planner(
                self.source, calibration=self.calibration, teacher=self.teacher, downstream=self.downstream_task
            )  # fmt: skip
            self.plans, refused = plans_of(planner, recipes, named=options.named)
        self.refused = {**options.refused, **refused}

    def _unlike_published(self) -> dict[str, str]:
        """Why a recipe is not what a published checkpoint is quantized by, by its text."""
        found = {}
        for recipe in self.options.recipes:
            try:
                formats.recipes.check_recipe(self.source.published, recipe)
            except CompressionError as error:
                if not self.options.named:
                    raise
                found[recipe.text] = str(error)
        return found

    @property
    def base(self) -> "Base":
        """The uncompressed model, opened at its first use and kept; that of a published checkpoint is dequantized."""
        if self._base is None:
            self._base = compression.open_base(
                self.source, self.options.device, seed=self.options.seed, dequantize=True
            )
        return self._base

    def compressed(self, recipe: Recipe) -> "Compressed":
        """The base under a recipe, or a published checkpoint as it is; the one before it is let go first.

        Raises:
            NotAvailable: the recipe cannot be applied to this base.
            Exception: whatever compressing raised, again for each measurement of the recipe.
        """
        if why := self.refused.get(recipe.text):
            raise NotAvailable(why)
        if self._compressed is None or self._compressed[0] != recipe:
            self.release()
            base = self.base
            try:
                result = self._compress(recipe)
            except Exception as error:
                self._compressed = (recipe, error)
                raise
            self._compressed = (recipe, result)
            self.kernels[recipe.text] = result.kernels()
            self.steps[recipe.text] = tuple(zip(result.executed, result.seconds, strict=False))
            self.notes[recipe.text] = result.notes
            self.layers[recipe.text] = layers.describe(result, base.model)
        if isinstance(self._compressed[1], BaseException):
            raise self._compressed[1]
        return self._compressed[1]

    def _compress(self, recipe: Recipe) -> "Compressed":
        if self.source.published is not None and recipe.steps:
            backend = getattr(recipe.steps[0].method, "backend", None)
            return compression.load(self.source.place, self.options.device, backend=backend)
        plan = self.plans.get(recipe.text, recipe)  # there is none of a recipe beside those of the run
        given = {} if recipe.text in self.plans else {
            "calibration": self.calibration, "teacher": self.teacher, "downstream": self.downstream_task
        }  # fmt: skip
        return compression.compress(
            self.base, plan, seed=self.options.seed, cache=self._steps, progress=self._progress, **given
        )  # fmt: skip

    def artefact_folder(self, recipe: Recipe) -> Path:
        """Where the compressed model lies on disk, for processes that open it by themselves; gone with the model."""
        model = self.compressed(recipe)  # lets go of the folder of another recipe
        if self._folder is None:
            folder = Path(tempfile.mkdtemp(prefix="bench-"))
            try:
                model.save(folder / "artefact")
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._folder = folder
        return self._folder / "artefact"

    def release(self) -> None:
        """Let go of the compressed model, its folder, and the copies that compute."""
        self.release_compute_models()
        self._compressed = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        gc.collect()
        if self.options.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    @functools.cached_property
    def _compute(self) -> ComputeModels:
        return ComputeModels(self.options.compute_dtype, self.base, self.options.device)

    @property
    def compute_dtype(self) -> str | None:
        """The dtype in which quality is measured; None for the stored one."""
        return self._compute.dtype

    @property
    def compute_fallback(self) -> str | None:
        """Why quality is measured in the stored dtype although that is slow; None if it is not."""
        return None if self.compute_dtype else self._compute.fallback_reason

    def compute_model(self, model: "Base | Compressed") -> "nn.Module":
        """The model whose quality is measured: the stored one, or its copy in fp32."""
        return self._compute.of(model)

    def release_compute_models(self) -> None:
        """Let go of the copies; the next use makes them again."""
        if "_compute" in vars(self):
            self._compute.release()

    def decoder(self, model: "Compressed | Base", load: Load, mode: str = "eager") -> Decoder:
        return Decoder(model.model, load, mode=mode, seed=self.options.seed)

    def interleaved(self, recipe: Recipe, load: Load, mode: str) -> Interleaved:
        """The base and the compressed model, ready to generate in turn; for fp16 the base alone."""
        models = [self.base] if recipe.text == UNCOMPRESSED else [self.base, self.compressed(recipe)]
        return Interleaved([self.decoder(model, load, mode) for model in models])

    @functools.cached_property
    def _steps(self) -> "StepCache":
        """Keeps what recipes that train come to, and what other recipes begin with as they do."""
        beginnings: list[tuple[str, ...]] = []
        for plan in self.plans.values():
            if plan.trains:
                beginnings += [plan.executed[: i + 1] for i in range(len(plan.schedule))]
        whole = {plan.executed for plan in self.plans.values()}
        shared = {steps for steps in beginnings if beginnings.count(steps) + (steps in whole) > 1}
        return compression.StepCache(self.options.cache, keep=lambda steps: tuple(steps) in shared)
