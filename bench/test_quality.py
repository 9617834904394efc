"""Quality: what the compressed model still knows."""

import pytest

from bench._errors import DataError, NotAvailable
from bench.metrics.perplexity import PerplexityProtocol, perplexity
from bench.metrics.tasks import score, suite_of
from compression._recipe import UNCOMPRESSED

pytestmark = pytest.mark.quality

_BATCH = 4  # fixed, since scores move in their last bits with it


def test_perplexity(workbench, recipe):
    protocol = PerplexityProtocol(batch_size=_BATCH, **workbench.options.protocol)
    workbench.note_data("perplexity", workbench.data.source(protocol.split, what=protocol.what).digest)

    def of(model):
        return perplexity(model.model, _tokenizer(workbench), workbench.data, protocol, device=workbench.options.device)

    def take():
        base = workbench.base_reading(("perplexity", protocol), lambda: of(workbench.base))
        return (base, None) if recipe.text == UNCOMPRESSED else (of(workbench.compressed(recipe)), base)

    asked = {"protocol": protocol.name, "length": protocol.length, "split": protocol.split, "batch": _BATCH}
    workbench.measure("perplexity", recipe, take, asked)


def test_task(workbench, recipe, task):
    options = workbench.options

    def of(model):
        if getattr(model, "cache_factory", None) is not None:
            raise NotAvailable("the recipe brings a cache of its own, which scoring does not use yet")
        prepared = workbench.task(task)
        return score(prepared, model.model, _tokenizer(workbench), limit=options.limit, rows=options.task_rows,
                     chat=options.chat_template)  # fmt: skip

    def take():
        base = workbench.base_reading(("task", task), lambda: of(workbench.base))
        return (base, None) if recipe.text == UNCOMPRESSED else (of(workbench.compressed(recipe)), base)

    filtered = None if task.filter == "none" else task.filter
    asked = {"task": task.name, "shots": task.shots, "score": task.metric, "filter": filtered, "limit": options.limit,
             "rows": options.task_rows, "chat": options.chat_template or None}  # fmt: skip
    workbench.measure("task", recipe, take, asked, notes=lambda reading: ("ok", reading.remark, None))


def test_average(workbench, recipe, tasks):
    def take():
        reading = suite_of(workbench.rows.values(), recipe.text)
        base = type(reading)(accuracies=reading.base, base=reading.base)
        return (reading, None) if recipe.text == UNCOMPRESSED else (reading, base)

    asked = {"tasks": tasks, "limit": workbench.options.limit, "rows": workbench.options.task_rows,
             "chat": workbench.options.chat_template or None}  # fmt: skip
    workbench.measure("tasks", recipe, take, asked)


def _tokenizer(workbench):
    if workbench.base.tokenizer is None:
        raise DataError(f"base {workbench.source.text} has no tokenizer: quality needs tokenizer.json beside it")
    return workbench.base.tokenizer
