"""What a score is: right answers over questions, by any route the same."""

import pytest
from lm_eval.models.huggingface import HFLM
from task_requests import built

from bench.data.sources import open_data
from bench.data.tasks.table import SUITE
from bench.errors import MetricError, NotAvailable
from bench.measure import reference_scores as reference
from bench.measure.scoring.lm_eval import TOLERANCE, Scorer
from bench.measure.scoring.prepare import Prepared, prepare
from bench.metrics.tasks import TaskReading, accuracy, score
from bench.reference import tasks
from bench.results import item_pairs
from bench.results.items import Items, hashes_of

EMBEDDED = open_data("embedded", base="reference")


class TestScores:
    @pytest.mark.parametrize("name", ["hellaswag", "mmlu"])
    def test_a_score_is_the_same_again_and_for_other_batches(self, student, name):
        prepared = prepare(SUITE[name], EMBEDDED)

        first, again, one, many = (score(prepared, *student, limit=8, rows=rows) for rows in (None, None, 1, 32))

        assert first == again
        assert (first.values, first.hashes) == (one.values, one.hashes) == (many.values, many.hashes)
        assert accuracy(first) == sum(first.values) / len(first.values)
        assert 0 < accuracy(first) <= 1
        assert len(first.values) == len(set(first.hashes)) == 8 * len(prepared.parts)

    def test_choices_are_counted_by_their_likelihood(self, student):
        prepared = prepare(SUITE["arc_easy"], EMBEDDED)
        items = tasks.items("facts_easy", "test")[:12]
        means = reference.likelihoods(*student, items)  # by token; every one of these choices has as many
        right = [
            max(range(4), key=lambda n, of=of, item=item: of[n] / len(item["choices"][n])) == item["answer"]
            for of, item in zip(means, items, strict=True)
        ]

        assert [float(each) for each in right] == list(score(prepared, *student, limit=12).values)

    def test_answers_and_programs_are_counted_as_the_reference_counts_them(self, student):
        for name in ("gsm8k", "humaneval"):
            items = tasks.items(SUITE[name].stand_in, "test")[:6]
            prepared = prepare(SUITE[name], EMBEDDED, run_code=True)

            assert reference._answer_points(*student, items) == list(score(prepared, *student, limit=6).values)

    def test_a_chat_template_that_is_not_there_is_not_passed_over(self, student):
        with pytest.raises(NotAvailable, match="no chat template"):
            score(prepare(SUITE["arc_easy"], EMBEDDED), *student, limit=1, chat=True)

    def test_a_chat_template_is_put_around_questions(self, student):
        model, tokenizer = student
        prepared = prepare(SUITE["arc_easy"], EMBEDDED)
        plain = score(prepared, model, tokenizer, limit=3)
        templated = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>")
        templated.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

        assert set(score(prepared, model, templated, limit=3, chat=True).hashes).isdisjoint(plain.hashes)

    def test_cut_prompts_are_counted_and_said(self, student, monkeypatch):
        model, tokenizer = student
        prepared = prepare(SUITE["mmlu"], EMBEDDED)
        monkeypatch.setattr(model.config, "max_position_embeddings", 64)

        reading = score(prepared, model, tokenizer, limit=1)

        assert reading.truncated == len(prepared.parts)  # of each question one prompt, before all choices
        assert "prompts of MMLU exceed the context: their beginning was left out" in reading.remark


@pytest.mark.parametrize(
    "name", ["hellaswag", "arc_easy", "arc_challenge", "mmlu", "gsm8k", "boolq", "piqa", "winogrande"]
)
def test_scores_on_public_data_are_those_of_hflm(student, shared, name):
    prepared = prepare(SUITE[name], shared)
    prepared = Prepared(prepared.task, dict(list(prepared.parts.items())[:2]), prepared.data)
    requests = built(prepared, 1 if name == "gsm8k" else 2)
    for request in requests:
        if request.request_type == "generate_until":
            request.arguments[1]["max_gen_toks"] = 24
    kind = requests[0].request_type

    expected = getattr(HFLM(pretrained=student[0], tokenizer=student[1], batch_size=1), kind)(requests, True)

    found = getattr(Scorer(*student), kind)(requests)
    if kind == "generate_until":
        assert expected == found
    else:
        assert [greedy for _, greedy in expected] == [greedy for _, greedy in found]
        assert [value for value, _ in expected] == pytest.approx([value for value, _ in found], abs=TOLERANCE)


@pytest.mark.parametrize("task", SUITE.values(), ids=lambda task: task.name)
def test_what_kind_results_are_is_the_tasks_to_say_whatever_the_values(task):
    """A model that gets everything wrong, or right, is still compared with one that does not."""

    def items_of(values):
        reading = TaskReading(task=task, data="d", values=values, hashes=hashes_of(range(len(values))))
        return Items(*reading.items["quality.accuracy"])

    broken, mixed = items_of((0.0,) * 4), items_of((1.0, 0.0, 1.0, 0.0))

    assert item_pairs.compare(broken, mixed).difference == -0.5
    if task.metric == "f1":
        assert item_pairs.compare(broken, items_of((0.5, 1.0, 0.25, 0.0))).difference == -0.4375
    else:
        with pytest.raises(MetricError, match="must be 0 or 1"):
            items_of((0.5, 1.0, 0.25, 0.0))
