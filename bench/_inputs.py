"""What the measurements of a run read besides models: texts, tasks, questions and the documents they are about."""

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench._errors import NotAvailable

if TYPE_CHECKING:
    from bench.data import Data
    from bench.rag.collection import Collection
    from bench.rag.pipeline import Retrieved
    from bench.sandbox import Forbidden
    from bench.workbench import Options
    from compression._checkpoint import BaseSource


class Inputs:
    """Each read once, when it is first asked for; the same for all recipes."""

    options: "Options"
    source: "BaseSource"

    @functools.cached_property
    def data(self) -> "Data":
        from bench.data import open_data

        return open_data(self.options.data, base=self.options.base)

    @functools.cached_property
    def sandbox(self) -> "Forbidden":
        """What the programs that models write cannot do here; to be asked for before one is run (`bench.sandbox`).

        Raises:
            NotAvailable: they may not be run, or cannot be run apart.
        """
        if not self.options.allow_code_execution:
            raise NotAvailable("programs written by models are run only with --allow-code-execution")
        from bench.sandbox import forbidden

        return forbidden()

    @functools.cached_property
    def collection(self) -> "Collection":
        """The questions of RAG and the documents they are about; only the reference is asked as it was trained."""
        from bench.rag.readers import open_collection

        assert self.options.rag is not None
        found = open_collection(self.options.rag.dataset, self.options.rag.documents)
        return found if self.options.base in ("reference", "reference-teacher") else replace(found, form="plain")

    @functools.cached_property
    def retrieved(self) -> "Retrieved":
        """What was found for each question, the same for all recipes; indexes are kept beside the journal."""
        from bench.rag.answers import check_lengths
        from bench.rag.pipeline import retrieve

        assert self.options.rag is not None
        tokenizer, device = self.base.tokenizer, self.options.device
        cache = self.options.journal.parent / "retrieval"
        found = retrieve(self.options.rag, tokenizer, device=device, cache=cache, collection=self.collection)
        if tokenizer is not None and found.collection.answered:
            check_lengths(found, tokenizer, self.source.config.get("max_position_embeddings"), self.options.new_tokens)
        return found

    @functools.cached_property
    def _tasks(self) -> dict[str, Any]:
        return {}

    def task(self, task: Any) -> Any:
        """A task with its data (`bench.tasks.prepare.Prepared`), read once.

        Raises:
            NotAvailable: it cannot be had, again at every call.
            DataError: its data is malformed.
        """
        from bench.tasks.prepare import prepare

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
        """The task that recovery is measured on."""
        from bench.metrics.recovery import check_task

        return check_task(self.options.downstream, self.source)
