"""Tokens of a task, counted on some of its questions."""

import pytest
import torch

from bench.data.sources import open_data
from bench.data.tasks.table import SUITE
from bench.measure.scoring.count import FEW, MORE, task_tokens
from bench.measure.scoring.lm_eval import Scorer
from bench.measure.scoring.prepare import prepare
from bench.metrics.tasks import score

EMBEDDED = open_data("embedded", base="reference")


@pytest.fixture(scope="module")
def scorer(student):
    return Scorer(*student)


@pytest.mark.parametrize("name", ["hellaswag", "mmlu"])
def test_as_many_tokens_are_counted_as_the_model_reads(student, scorer, name):
    model, read = student[0], []
    prepared = prepare(SUITE[name], EMBEDDED)
    found = task_tokens(prepared, scorer, limit=MORE)

    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, __, named: read.append(named["input_ids"].numel()), with_kwargs=True
    )
    try:
        scorer.loglikelihood([each for part in prepared.parts.values() for each in part.instances or ()])
    finally:
        hook.remove()

    assert found.read == pytest.approx(sum(read), rel=0.05)
    assert 0 == found.written


def test_the_tokens_of_answers_are_those_that_the_task_allows(scorer):
    prepared = prepare(SUITE["gsm8k"], EMBEDDED)
    [part] = prepared.parts.values()

    found = task_tokens(prepared, scorer, limit=20)

    assert 20 * part.config.generation_kwargs["max_gen_toks"] == found.written
    assert MORE == len(found.prompts)


@pytest.mark.parametrize("name", ["hellaswag", "gsm8k", "mmlu"])
def test_further_questions_count_as_those_that_were_looked_at(scorer, name):
    prepared = prepare(SUITE[name], EMBEDDED)

    few, many = (task_tokens(prepared, scorer, limit=limit) for limit in (MORE, 60))

    for part in prepared.parts.values():
        part.build_all_requests(limit=60 // len(prepared.parts), rank=0, world_size=1)
    exact = sum(scorer.tokens(part.instances)[0] for part in prepared.parts.values())
    assert few.read < many.read == pytest.approx(exact, rel=0.2)


def test_a_limit_below_what_is_looked_at_is_counted_exactly(student, scorer):
    prepared = prepare(SUITE["arc_easy"], EMBEDDED)

    found = task_tokens(prepared, scorer, limit=FEW - 1)

    [part] = prepared.parts.values()
    assert found.read == scorer.tokens(part.instances)[0]
    with torch.inference_mode():
        assert FEW - 1 == len(score(prepared, *student, limit=FEW - 1).values)
