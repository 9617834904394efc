"""Judging: how good and how clear the answers of a compressed model are, where no string can be compared."""

import pytest

from bench.errors import NotAvailable
from bench.measure.judge import bias, readings
from bench.measure.judge.answers import answers_of
from bench.measure.rag.encoders import model_read
from compression import Recipe
from compression.recipes.recipe import UNCOMPRESSED

pytestmark = pytest.mark.judge


def test_judged(workbench, recipe):
    def of(said):
        return readings.judged(*workbench.judging, said())

    against_base(workbench, "judge", recipe, of, judge=judge_of(workbench))


def test_bias(workbench, recipe):
    def take():
        judge, steps = workbench.judging
        return workbench.base_reading(
            ("judge_bias",), lambda: bias.measured(judge, steps, answers(workbench, Recipe()))
        ), None

    def notes(found):
        count = len(found.invalid)
        return "ok", f"{count} replies were no verdict, such as {found.invalid[0]}" if count else None, None

    measure(workbench, "judge_bias", recipe, take, notes, judge=judge_of(workbench))


def test_clarity(workbench, recipe):
    def of(said):
        model = workbench.small_model
        return readings.clarity(said(), model and model.perplexities, workbench.coherence)

    setup = workbench.options.judge
    vectors = model_read(setup.encoder) if setup.encoder else "tf-idf"
    model = workbench.fluency_model
    against_base(workbench, "clarity", recipe, of, lm=model and model_read(model), vectors=vectors)


def test_likelihood(workbench, recipe):
    def of(said):
        likely = workbench.likelihoods  # or why there are none, before anything is answered
        answered = said()
        return readings.likelihood(answered, likely(answered))

    by = workbench.likelihood_model
    against_base(workbench, "likelihood", recipe, of, by=by and model_read(by))


def answers(workbench, recipe):
    """What the model under a recipe answers, taken once for all measurements of it."""
    options = workbench.options

    def of(model):
        return answers_of(
            workbench.compute_model(model), workbench.base.tokenizer, workbench.asked, form=workbench.collection.form,
            decoding=options.judge.decoding, new_tokens=options.judge.new_tokens, seed=options.seed,
        )  # fmt: skip

    if recipe.text == UNCOMPRESSED:
        return workbench.base_reading(("judge_answers",), lambda: of(workbench.base))
    return workbench.reading(recipe, "judge_answers", of)


def judge_of(workbench):
    try:
        judge = workbench.judging[0]
        return getattr(judge, "read", judge.name)  # a model of a folder by its digest
    except NotAvailable:
        return None


def against_base(workbench, of, recipe, read, **params):
    """Measure what `read` makes of answers, which it is given as a function that takes them."""

    def take():
        base = workbench.base_reading((of,), lambda: read(lambda: answers(workbench, Recipe())))
        if recipe.text == UNCOMPRESSED:
            return base, None
        return read(lambda: answers(workbench, recipe)).beside(base)

    measure(workbench, of, recipe, take, **params)


def measure(workbench, of, recipe, take, notes=None, **params):
    workbench.note_data(of, workbench.collection.digest)
    setup = workbench.options.judge
    try:
        count = len(workbench.asked)
    except NotAvailable:  # which `take` says too
        count = None
    asked = {"data": workbench.collection.read, "questions": count, "decoding": setup.decoding,
             "new_tokens": setup.new_tokens, "template": workbench.options.template_text,
             "draw": None if workbench.collection.drawn else workbench.options.seed}  # fmt: skip
    workbench.measure(of, recipe, take, asked | params, notes=notes, compute_models=True)
