"""RAG: whether a compressed model still answers from what was retrieved."""

import pytest

from bench.errors import DataError
from bench.measure.rag import readings, robustness
from bench.measure.rag.encoders import model_read
from bench.measure.rag.prompts import DECODING
from compression.recipes.recipe import UNCOMPRESSED

pytestmark = pytest.mark.rag


def test_context(workbench, recipe):
    found = workbench.retrieved
    measure(workbench, "rag_context", recipe, lambda: (readings.contexts(found), None))
    measure(workbench, "rag_judged_context", recipe, lambda: (readings.judged_contexts(found), None))


@pytest.mark.parametrize("relevance", ["judged", "tokens"])
def test_ranking(workbench, recipe, relevance):
    reading = readings.rankings
    measure(workbench, "rag_ranking", recipe, lambda: (reading(workbench.retrieved, relevance), None),
            relevance=relevance)  # fmt: skip


@pytest.mark.parametrize("decoding", DECODING)
def test_answers(workbench, recipe, decoding):
    found = workbench.retrieved
    taken = {}  # the answers are read by several measurements

    def of(model, name):
        source = workbench.source
        note = {"run": workbench.journal.run, "base": source.label, "base_hash": source.digest, "recipe": name}
        return readings.replies(found, reader(workbench, workbench.compute_model(model)), decoding, note)

    def both():
        if not taken:
            base = workbench.base_reading(("rag_answers", decoding), lambda: of(workbench.base, UNCOMPRESSED))
            plain = recipe.text == UNCOMPRESSED
            taken["both"] = (base, None) if plain else (of(workbench.compressed(recipe), recipe.text), base)
        return taken["both"]

    def compared():
        readings.comparing(found)
        return both()

    def encoded():
        readings.encoding(found)
        device = workbench.options.device
        return tuple(reading and readings.similarities(found, reading, device) for reading in both())

    seeds = found.setup.seeds if decoding == "sampled" else None
    takes = {"rag_answers": both, "rag_comparison": compared, "rag_bertscore": encoded}
    for of_what, take in (takes | ({"rag_spread": both} if decoding == "sampled" else {})).items():
        new_tokens = workbench.options.new_tokens
        bertscore = found.setup.bertscore if of_what == "rag_bertscore" else None
        measure(workbench, of_what, recipe, take, compute_models=True, decoding=decoding, seeds=seeds,
                new_tokens=new_tokens, bertscore=bertscore and model_read(bertscore))  # fmt: skip


def test_speed(workbench, recipe):
    found, taken = workbench.retrieved, []

    def take():
        models = [workbench.base] if recipe.text == UNCOMPRESSED else [workbench.base, workbench.compressed(recipe)]
        readers = [reader(workbench, each.model) for each in models]  # the stored models, whose time this is
        *base, reading = readings.timed(found, readers, workbench.options.runs)
        taken[:] = [reading, base[0] if base else None]
        return taken

    def without_context():
        readings.comparing(found)
        pair = list(taken or take())
        taken.clear()  # another look at a regression is another measurement
        return pair

    asked = {"each": lambda r: r.each(), "new_tokens": workbench.options.new_tokens}
    measure(workbench, "rag_speed", recipe, take, more=lambda _: take(), **asked)  # the same questions once more
    measure(workbench, "no_rag_speed", recipe, without_context, more=lambda _: without_context(), **asked)


@pytest.mark.parametrize(("distractors", "gold"), robustness.GRID)
def test_distractors(workbench, recipe, distractors, gold):
    def of(model):
        return robustness.distracted(workbench.retrieved, reader(workbench, model), distractors, gold)

    against_base(workbench, "rag_distracted", recipe, of, distractors=distractors, gold=gold)


def test_unanswerable(workbench, recipe):
    against_base(
        workbench,
        "rag_unanswerable",
        recipe,
        lambda model: robustness.unanswerable(workbench.retrieved, reader(workbench, model)),
    )


def reader(workbench, model):
    tokenizer = workbench.base.tokenizer
    if tokenizer is None:
        raise DataError(f"base {workbench.source.text} has no tokenizer: RAG needs tokenizer.json beside the weights")
    options = workbench.options
    return readings.Reader(model=model, tokenizer=tokenizer, device=options.device, new_tokens=options.new_tokens,
                           template=options.template)  # fmt: skip


def against_base(workbench, of, recipe, read, **params):
    def take():
        base = workbench.base_reading((of, *params.values()), lambda: read(workbench.compute_model(workbench.base)))
        if recipe.text == UNCOMPRESSED:
            return base, None
        return read(workbench.compute_model(workbench.compressed(recipe))), base

    measure(workbench, of, recipe, take, compute_models=True, **params)


def measure(workbench, of, recipe, take, *, each=None, more=None, compute_models=False, **params):
    found = workbench.retrieved
    workbench.note_data(of, found.collection.digest)
    asked = {**found.params, "template": workbench.options.template_text, **params}
    workbench.measure(of, recipe, take, asked, each=each, more=more, compute_models=compute_models)
