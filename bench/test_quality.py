"""Quality: what the compressed model still knows."""

from contextlib import suppress

import pytest

from bench.errors import DataError, NotAvailable
from bench.measure.perplexity import perplexity
from bench.measure.perplexity_windows import PerplexityProtocol
from bench.metrics.tasks import score, suite_of
from compression import Recipe
from compression.recipes.recipe import UNCOMPRESSED

pytestmark = pytest.mark.quality

_BATCH = 4  # fixed, since scores move in their last bits with it


def _protocol(workbench):
    protocol = PerplexityProtocol(batch_size=_BATCH, **workbench.options.protocol)
    source = workbench.data.source(protocol.split, what=protocol.what)
    asked = {"protocol": protocol.name, "length": protocol.length, "split": protocol.split, "data": source.read,
             "stride": protocol.shown_stride}  # fmt: skip
    if protocol.name == "o":
        asked["template"] = workbench.options.template_text
    return protocol, asked


def _read(workbench, protocol, recipe):
    """The model under a recipe, read beside the base; the base alone for fp16."""
    tokenizer, device = _tokenizer(workbench), workbench.options.device

    def of(model, base=None):
        model, base = workbench.compute_model(model), base and workbench.compute_model(base)
        return perplexity(model, tokenizer, workbench.data, protocol, device=device, base=base,
                          states=workbench.base_states, template=workbench.options.template)  # fmt: skip

    if recipe.text == UNCOMPRESSED:
        return workbench.base_reading(("perplexity", protocol), lambda: of(workbench.base))
    return workbench.reading(recipe, protocol, lambda model: of(model, workbench.base))


@pytest.mark.ordering
def test_perplexity(workbench, recipe):
    protocol, asked = _protocol(workbench)
    workbench.note_data("perplexity", workbench.data.source(protocol.split, what=protocol.what).digest)

    def take():
        base = _read(workbench, protocol, Recipe())
        return (base, None) if recipe.text == UNCOMPRESSED else (_read(workbench, protocol, recipe), base)

    def notes(reading):
        return "ok", "; ".join(workbench.notes.get(recipe.text, ())) or None, None

    workbench.measure("perplexity", recipe, take, asked, notes=notes, compute_models=True)


def test_divergence(workbench, recipe):
    if recipe.text == UNCOMPRESSED:
        pytest.skip("the base does not differ from itself")
    protocol, asked = _protocol(workbench)
    workbench.note_data("divergence", workbench.data.source(protocol.split, what=protocol.what).digest)

    def take():
        found = _read(workbench, protocol, recipe).divergence
        return found, found.of_itself

    workbench.measure("divergence", recipe, take, asked, compute_models=True)


def test_task(workbench, recipe, task):
    options = workbench.options

    def of(model):
        prepared = workbench.task(task)
        return score(prepared, workbench.compute_model(model), _tokenizer(workbench), limit=options.limit,
                     rows=options.task_rows, chat=options.chat_template, template=options.template)  # fmt: skip

    def take():
        base = workbench.base_reading(("task", task), lambda: of(workbench.base))
        return (base, None) if recipe.text == UNCOMPRESSED else (of(workbench.compressed(recipe)), base)

    filtered = None if task.filter == "none" else task.filter
    asked = {"task": task.name, "shots": task.shots, "score": task.metric, "filter": filtered, "limit": options.limit,
             "temperature": task.temperature or None, "rows": options.task_rows, "chat": options.chat_template or None,
             "programs": _programs(options, [task]), "template": _template(options)}  # fmt: skip
    with suppress(NotAvailable):  # which `of` says
        asked["data"] = workbench.task(task).data
    workbench.measure("task", recipe, take, asked, compute_models=True)


def test_average(workbench, recipe, tasks):
    def take():
        reading = suite_of(workbench.rows.values(), recipe.text)
        base = type(reading)(accuracies=reading.base, base=reading.base)
        return (reading, None) if recipe.text == UNCOMPRESSED else (reading, base)

    options = workbench.options
    asked = {"tasks": tasks, "limit": options.limit, "rows": options.task_rows, "chat": options.chat_template or None,
             "programs": _programs(options, options.tasks), "template": _template(options)}  # fmt: skip
    workbench.measure("tasks", recipe, take, asked)


def _programs(options, tasks):
    """Part of the key where programs had to be run and were not: another row than that of a run that may run them."""
    return None if options.allow_code_execution or not any(task.runs_code for task in tasks) else "not run"


def _template(options):
    """Part of the key where prompts are in a chat template: its arguments, unless they are the usual ones."""
    return options.template_text if options.chat_template else None


def _tokenizer(workbench):
    if workbench.base.tokenizer is None:
        raise DataError(f"base {workbench.source.text} has no tokenizer: quality needs tokenizer.json beside it")
    return workbench.base.tokenizer
