"""What a score is: right answers over questions, by any route the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from task_requests import built

from bench.data.sources import open_data
from bench.data.tasks.table import SUITE
from bench.errors import MetricError, NotAvailable
from bench.measure import reference_scores as reference
from bench.measure.scoring.lm_eval import TOLERANCE, Scorer
from bench.measure.scoring.prepare import Prepared, prepare, spread
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
        assert len(first.values) == len(set(first.hashes)) == 8

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

        reading = score(prepared, model, tokenizer, limit=3)

        assert 3 == reading.truncated  # of each question one prompt, before all choices
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


def test_a_limit_counts_the_questions_of_all_parts_and_scores_those_of_hflm(student):
    prepared = prepare(SUITE["mmlu"], EMBEDDED)

    reading = score(prepared, *student, limit=8)

    questions = prepared.questions(8)
    theirs = evaluate(
        lm=HFLM(pretrained=student[0], tokenizer=student[1], batch_size=1), samples=questions, bootstrap_iters=0,
        task_dict={"tasks": {name: prepared.parts[name] for name in questions}, "groups": {}},
    )["samples"]  # fmt: skip
    expected = [sample for name in questions for sample in theirs[name]]
    asked = [[s["doc_id"] for s in theirs[name]] for name in questions]
    assert 8 == len(expected) and all(ids == list(range(len(ids))) for ids in asked)
    assert [sample["acc"] for sample in expected] == list(reading.values)
    assert reading.hashes == hashes_of(
        [name, [list(map(str, one)) for one in sample["arguments"]], str(sample["target"])]
        for name in questions
        for sample in theirs[name]
    )


def test_a_limit_of_one_part_takes_its_first_questions_and_none_takes_all():
    prepared = prepare(SUITE["hellaswag"], EMBEDDED)

    [(name, every)] = prepared.questions(None).items()

    assert {name: range(8)} == prepared.questions(8)
    assert {name: every} == prepared.questions(10**6)
    assert len(every) == len(prepared.parts[name].eval_docs)


def test_a_limit_of_mmlu_is_spread_over_its_57_subjects_by_their_sizes(shared):
    prepared = prepare(SUITE["mmlu"], shared)
    sizes = {name: len(part.eval_docs) for name, part in prepared.parts.items()}

    few, many = prepared.questions(20), prepared.questions(1000)

    assert 57 == len(sizes)
    assert (20, 1000) == tuple(sum(map(len, each.values())) for each in (few, many))
    assert all(abs(len(many[name]) - 1000 * size / sum(sizes.values())) < 1 for name, size in sizes.items())


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60), st.integers(1, 10_000))
def test_a_spread_gives_each_part_its_share_to_within_one_question(sizes, limit):
    total = sum(sizes)

    counts = spread(dict(enumerate(sizes)), limit)

    assert min(limit, total) == sum(counts.values())
    for size, count in zip(sizes, counts.values(), strict=True):
        assert 0 <= count <= size
        assert abs(count - min(limit, total) * size / total) < 1


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
