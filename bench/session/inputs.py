"""Inputs of a run besides models: texts, tasks, questions and their documents."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import compression
from bench.data.collections.readers import open_collection
from bench.data.sources import open_data
from bench.errors import DataError, NotAvailable, OptionError
from bench.measure.judge.answers import check, questions_of
from bench.measure.judge.clarity import DEFAULT_LM, SmallModel, coherence_by_encoder, coherence_by_words
from bench.measure.judge.g_eval import write_steps
from bench.measure.judge.likelihood import likelihoods
from bench.measure.judge.local import LocalJudge
from bench.measure.rag.pipeline import retrieve
from bench.measure.rag.prompts import check_lengths
from bench.measure.sandbox.run import forbidden
from bench.measure.scoring.prepare import prepare
from bench.metrics.recovery import check_task
from bench.results.row import Input
from compression import calibration, engine, training

if TYPE_CHECKING:
    from bench.data.collections.collection import Collection
    from bench.data.sources import Data
    from bench.measure.judge.answers import Answered, Asked
    from bench.measure.judge.asking import Judge
    from bench.measure.judge.clarity import SmallModel
    from bench.measure.rag.pipeline import Retrieved
    from bench.measure.sandbox.run import Forbidden
    from bench.session.options import Options
    from compression import Recipe
    from compression.calibration.text import Calibration
    from compression.checkpoints.base import BaseSource
    from compression.training.downstream import Downstream


class Inputs:
    """Each read once, when it is first asked for; the same for all recipes."""

    options: "Options"
    source: "BaseSource"

    @functools.cached_property
    def calibration(self) -> "Calibration | None":
        """The text that recipes are calibrated on; None where the base brings none."""

        return calibration.text.open_calibration(self.options.calibration, self.source)

    @functools.cached_property
    def downstream_task(self) -> "Downstream | None":
        """The task that recipes recover on; None where the base brings none."""
        return training.downstream.open_downstream(self.options.downstream, self.source)

    @functools.cached_property
    def teacher(self) -> "BaseSource | None":
        """The base that recipes learn from, on disk if one of them does; None where the base brings none."""
        text = self.options.teacher or engine.plan.default_teacher(self.source)
        if text in (None, "self"):
            return None if text is None else self.source
        recipes = (*self.options.recipes, *self.options.derived)
        needed = any(step.method.teacher for recipe in recipes for step in recipe.steps)
        return compression.locate(text).fetch() if needed else compression.locate(text)

    def inputs_of(self, recipe: "Recipe") -> dict[str, Input]:
        """What makes the model of a recipe besides the base, by name: the base's own defaults as well."""
        methods = [] if self.source.published is not None else [step.method for step in recipe.steps]
        found: dict[str, Input] = {}
        if self.calibration is not None and any(method.calibration for method in methods):
            found["calibration"] = Input(self.calibration.name, self.calibration.digest)
        if self.teacher is not None and any(method.teacher for method in methods):
            found["teacher"] = Input(self.teacher.label, self.teacher.digest)
        if self.downstream_task is not None and any(method.downstream for method in methods):
            found["downstream"] = Input(self.downstream_task.name, self.downstream_task.digest)
        return found

    def chosen(self, recipe: "Recipe") -> dict[str, Input]:
        """Those that are not what the base brings: they belong to the key of what they make."""
        return {name: each for name, each in self.inputs_of(recipe).items() if each.key != self._defaults[name]}

    @functools.cached_property
    def _defaults(self) -> "_Defaults":
        return _Defaults(self.source)

    @functools.cached_property
    def data(self) -> "Data":
        return open_data(self.options.data, base=self.options.base)

    @functools.cached_property
    def sandbox(self) -> "Forbidden":
        """What the programs that models write cannot do here; to be asked for before one is run (`sandbox.run`).

        Raises:
            NotAvailable: they may not be run, or cannot be run apart.
        """
        if not self.options.allow_code_execution:
            raise NotAvailable("programs written by a model are run only with --allow-code-execution")

        return forbidden()

    @functools.cached_property
    def collection(self) -> "Collection":
        """The questions of RAG and the documents they are about; only the reference is asked as it was trained."""
        assert self.options.rag is not None
        found = open_collection(self.options.rag.dataset, self.options.rag.documents)
        return found if self.options.base in ("reference", "reference-teacher") else replace(found, form="plain")

    @functools.cached_property
    def retrieved(self) -> "Retrieved":
        """What was found for each question, the same for all recipes; indexes are kept beside the journal."""
        assert self.options.rag is not None
        tokenizer, device = self.base.tokenizer, self.options.device
        cache = self.options.journal.parent / "retrieval"
        found = retrieve(self.options.rag, tokenizer, device=device, cache=cache, collection=self.collection)
        if tokenizer is not None and found.collection.answered:
            check_lengths(found, tokenizer, self.source.config.get("max_position_embeddings"), self.options.new_tokens)
        return found

    @functools.cached_property
    def asked(self) -> "tuple[Asked, ...]":
        """The questions whose answers are judged, each with its paragraph.

        Raises:
            NotAvailable: the collection has no paragraphs, or no answers.
        """
        assert self.options.judge is not None
        if self.base.tokenizer is None:
            raise DataError(
                f"base {self.source.text} has no tokenizer: answering questions needs tokenizer.json beside the weights"
            )
        return questions_of(
            self.collection, self.base.tokenizer, count=self.options.judge.questions, seed=self.options.seed,
            new_tokens=self.options.judge.new_tokens, positions=self.source.config.get("max_position_embeddings"),
            template=self.options.template,
        )  # fmt: skip

    @functools.cached_property
    def judging(self) -> "tuple[Judge, dict[str, str]]":
        """The judge, and the steps that it wrote for each criterion; replies are kept beside the journal.

        Raises:
            NotAvailable: no judge was given, or there is nothing that it could judge.
            JudgeError: it does not answer.
        """
        assert self.options.judge is not None
        check(self.collection)
        judge = self.options.judge.judge(self.options.journal.parent, self.options.device)
        return judge, write_steps(judge)

    @property
    def fluency_model(self) -> str | None:
        """The language model of fluency; None where none knows the language of what is answered."""
        assert self.options.judge is not None
        return self.options.judge.fluency or (DEFAULT_LM if self.collection.form == "reference" else None)

    @functools.cached_property
    def small_model(self) -> "SmallModel | None":
        """That model, opened."""
        name = self.fluency_model
        return None if name is None else SmallModel(name, self.options.device)

    @functools.cached_property
    def coherence(self) -> "Callable[[Sequence[Answered]], list[float]]":
        """The coherence of answers with their paragraphs.

        Raises:
            OptionError: there is no such encoder.
        """
        assert self.options.judge is not None
        encoder = self.options.judge.encoder
        return coherence_by_words if encoder is None else coherence_by_encoder(encoder, self.options.device)

    @property
    def likelihood_model(self) -> str | None:
        """The base under which answers are likely or not; None where there is none that knows what is asked."""
        assert self.options.judge is not None
        known = self.collection.form == "reference"
        return self.options.judge.local or ("reference-teacher" if known else None)

    @functools.cached_property
    def likelihoods(self) -> "Callable[[Sequence[Answered]], list[float]]":
        """The likelihood of answers under that model.

        Raises:
            NotAvailable: there is none.
        """

        if self.likelihood_model is None:
            raise NotAvailable("answer likelihood needs a local model as judge: give one with --judge SPEC")
        given = self.options.judge is not None and self.options.judge.local is not None
        judge = self.judging[0] if given else LocalJudge(self.likelihood_model, self.options.device)
        assert isinstance(judge, LocalJudge)
        return functools.partial(likelihoods, *judge.opened, form=self.collection.form)

    @functools.cached_property
    def _tasks(self) -> dict[str, Any]:
        return {}

    def task(self, task: Any) -> Any:
        """A task with its data (`bench.measure.scoring.prepare.Prepared`), read once.

        Raises:
            NotAvailable: it cannot be had, again at every call.
            DataError: its data is malformed.
        """
        if task.name not in self._tasks:
            try:
                if task.runs_code and self.options.allow_code_execution:
                    self.sandbox  # noqa: B018 - what cannot be contained is refused, or said, before
                self._tasks[task.name] = prepare(task, self.data, run_code=self.options.allow_code_execution)
            except NotAvailable as error:
                self._tasks[task.name] = error
        if isinstance(found := self._tasks[task.name], NotAvailable):
            raise found
        return found

    @functools.cached_property
    def downstream(self) -> str:
        """The task that recovery is measured on.

        Raises:
            OptionError: there is none, or one that is not scored.
            NotAvailable: the same for a named list of recipes, where no task was given.
        """
        try:
            return check_task(self.options.downstream, self.source)
        except OptionError as error:
            if self.options.named and self.options.downstream is None:
                raise NotAvailable(str(error)) from error
            raise


class _Defaults(dict[str, str | None]):
    """The keys of what a base itself brings as each input, once they are looked up; None where it brings none."""

    def __init__(self, source: "BaseSource") -> None:
        self._source = source

    def __missing__(self, name: str) -> str | None:

        if name == "teacher":
            text = engine.plan.default_teacher(self._source)
            found = None if text is None else Input(text, compression.locate(text).digest)
        else:
            opened = {
                "calibration": calibration.text.open_calibration,
                "downstream": training.downstream.open_downstream,
            }[name](None, self._source)
            found = None if opened is None else Input(opened.name, opened.digest)
        self[name] = found and found.key
        return self[name]
