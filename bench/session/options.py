"""The checked options of `pytest bench`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.measure.generation import Load
from bench.results.bases import DEFAULT_BASE
from bench.results.journal import JOURNAL
from compression import Recipe
from compression.checkpoints.tokens import TEMPLATE_ARGUMENTS

if TYPE_CHECKING:
    from bench.measure.judge.setup import Setup as Judging
    from bench.measure.rag.pipeline import Setup


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for, checked."""

    base: str = DEFAULT_BASE
    recipes: tuple[Recipe, ...] = ()
    named: bool = False  # they are a list of the suite's own, of which what cannot be has rows that say why
    refused: Mapping[str, str] = field(default_factory=dict)  # by recipe text: why it cannot be
    data: str | None = None
    calibration: str | None = None
    teacher: str | None = None
    downstream: str | None = None
    derived: tuple[Recipe, ...] = ()  # recipes that are made beside those, for what is measured of them
    cache: Path | None = None
    device: str = "cpu"
    seed: int = 0
    compute_dtype: str = "auto"  # of quality; see `bench.session.compute`
    gate: str = "auto"
    against: str | None = None  # a commit whose code generates beside this one's
    baselines: Path = Path("baselines")
    update: bool = False
    force_update: bool = False  # also of a failed run, or from a tree with changed files
    journal: Path = JOURNAL
    resume: bool = False
    runtimes: tuple[str, ...] = ("native",)  # native, and engines of `bench.measure.engines`
    runtime_pythons: Mapping[str, Path] = field(default_factory=dict)  # of each engine
    runtime_dtype: str = "auto"
    runtime_devices: int = 1
    requests: int = 32  # of a round at a request rate
    batch_sizes: tuple[int, ...] = (1,)
    prompt_tokens: int = 128
    new_tokens: int = 128
    runs: int = 10
    warmup: int = 3
    tdp: float | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    rag: "Setup | None" = None
    judge: "Judging | None" = None
    tasks: tuple[Any, ...] = ()  # bench.data.tasks.table.Task
    limit: int | None = None
    task_rows: int | None = None
    chat_template: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)  # arguments of chat templates, beside the usual ones
    allow_code_execution: bool = False
    command: str = "pytest bench"
    run: str | None = None  # id of the run that this process is part of, where it did not begin it
    began: float = 0.0  # and when that began, in seconds since the epoch
    shared: str | None = None  # why no times can be taken on this device, in words

    def load(self, batch_size: int) -> Load:
        return Load(batch_size=batch_size, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens)

    @property
    def template_text(self) -> str | None:
        """Part of the key of what is measured with chat templates: their arguments, None where they are the usual."""
        other = {name: value for name, value in sorted(self.template.items())
                 if name not in TEMPLATE_ARGUMENTS or value != TEMPLATE_ARGUMENTS[name]}  # fmt: skip
        return json.dumps(other, sort_keys=True) if other else None

    @property
    def record_command(self) -> str:
        return f"{self.command} --update-baselines"
