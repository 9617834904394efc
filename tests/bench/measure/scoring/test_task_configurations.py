"""What is changed of lm-eval's configurations, and ours: votes, examples, programs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.data.sources import open_data
from bench.data.tasks import bundled
from bench.data.tasks.table import SUITE
from bench.measure.rag.overlap import squad_f1
from bench.measure.scoring import programs, quac
from bench.measure.scoring.lm_eval import Scorer
from bench.measure.scoring.prepare import prepare
from bench.metrics.tasks import score
from compression.errors import install_command

SIZES = ("_three_objects", "_five_objects", "_seven_objects")


def said(answer):
    return f"So it is.\nFinal Answer: The final answer is ${answer}$. I hope it is correct."


def test_the_27_files_of_bbh_are_the_23_tasks_of_its_paper():
    names = [one["dataset_name"] for one in bundled.configurations(SUITE["bbh"])]

    bare = {next((name.removesuffix(size) for size in SIZES if name.endswith(size)), name) for name in names}

    assert (27, 23) == (len(names), len(bare))
    assert all(3 == len(one["fewshot_config"]["samples"]) for one in bundled.configurations(SUITE["bbh"]))


def test_gsm8k_by_majority_samples_eight_at_its_temperature():
    (one,) = bundled.configurations(SUITE["gsm8k_maj8"])

    settings = bundled.with_settings(one, SUITE["gsm8k_maj8"])

    assert (8, 8, ["maj@8"]) == (
        settings["repeats"],
        settings["num_fewshot"],
        [f["name"] for f in settings["filter_list"]],
    )
    assert (True, 0.2) == tuple(settings["generation_kwargs"][name] for name in ("do_sample", "temperature"))


class TestMath:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("math_verify", reason=f"SymPy's LaTeX is not installed: {install_command('math')}")

    @pytest.mark.parametrize(
        ("samples", "right"),
        [
            ([said("4")] * 4, 1),
            ([said("5"), said("4"), said("4"), said("6")], 1),
            ([said("4"), said("5"), said("5"), said("6")], 0),
            ([said("4"), said("5"), said("4"), said("5")], 1),  # of equally frequent ones the first
            ([said("5"), said("4"), said("5"), said("4")], 0),
            (["I give up."] * 3 + [said("4")], 1),  # what has no answer has no vote
            (["I give up."] * 4, 0),
            ([said("\\frac{8}{2}"), said("8/2"), said("5"), said("6")], 1),
        ],
    )
    def test_the_most_frequent_answer_counts(self, samples, right):
        assert {"exact_match": right} == bundled.majority({"answer": "4"}, [samples])

    def test_the_answers_of_math_500_are_right_and_those_of_other_problems_wrong(self, shared):
        part = prepare(SUITE["math"], shared).parts["minerva_math_algebra"]
        docs = list(part.eval_docs)[:30]

        right = [part.process_results(doc, [[said(doc["answer"])] * 4])["exact_match"] for doc in docs]
        wrong = [part.process_results(doc, [[said(doc["answer"] + "+17")] * 4])["exact_match"] for doc in docs]

        assert (30, 0) == (sum(right), sum(wrong))

    def test_four_samples_of_each_problem_are_asked_for_and_their_majority_is_the_score(
        self, shared, student, monkeypatch
    ):
        prepared = prepare(SUITE["math"], shared)
        asked = []

        def write(self, requests, disable_tqdm=True):
            asked.extend(requests)
            places = {}  # of each sample among those of its problem: three of four end in the right answer
            found = []
            for one in requests:
                place = places[one.doc["problem"]] = places.get(one.doc["problem"], -1) + 1
                found.append(said("99" if place == 0 else one.doc["answer"]))
            return found

        monkeypatch.setattr(Scorer, "generate_until", write)
        reading = score(prepared, *student, limit=14)

        assert (1.0,) * 14 == reading.values
        assert 4 * 14 == len(asked)
        assert {"until": ["Problem:"], "do_sample": True, "temperature": 0.6, "top_p": 0.95} == asked[0].args[1]
        assert 5 == asked[0].args[0].count("Problem:")


class TestQuac:
    @pytest.mark.parametrize(
        ("answer", "truths", "f1"),
        [
            ("in 1987", ["in 1987"], 1.0),
            ("CANNOTANSWER", ["CANNOTANSWER"], 1.0),
            ("1987", ["CANNOTANSWER"], 0.0),
            ("1987", ["in 1987", "1987"], (1 + 2 / 3) / 2),
            ("1987", ["1987", "1987", "never"], 1.0),  # whichever is left out, one of the others is met
        ],
    )
    def test_f1_is_the_mean_over_leaving_out_each_truth(self, answer, truths, f1):
        assert quac.f1(answer, truths) == pytest.approx(f1)

    @given(st.lists(st.sampled_from(["in 1987", "1987", "Ann Lee", "Ann", "CANNOTANSWER"]), min_size=1, max_size=6))
    def test_a_question_is_scored_against_some_of_its_answers_and_never_above_the_best(self, answers):
        truths = quac.references(answers)

        assert truths and set(truths) <= {*answers, quac.NONE}
        assert (quac.NONE in truths) == (2 * answers.count(quac.NONE) >= len(answers))
        for answer in ("Ann", "in 1987"):
            assert 0 <= quac.f1(answer, truths) <= squad_f1(answer, truths)
        assert 0 <= quac.agreement(truths) <= 1

    def test_the_score_of_a_dialogue_is_the_mean_f1_of_its_questions(self, student, tmp_path, monkeypatch):
        (tmp_path / "quac").mkdir()
        (tmp_path / "quac/val_v0.2.json").write_text(
            """{"data": [{"title": "T", "section_title": "S", "paragraphs": [{"context": "It fell in 1987.", "qas": [
            {"question": "When?", "answers": [{"text": "in 1987"}], "orig_answer": {"text": "in 1987"}},
            {"question": "Why?", "answers": [{"text": "CANNOTANSWER"}], "orig_answer": {"text": "CANNOTANSWER"}}
            ]}]}]}"""
        )
        monkeypatch.setattr(Scorer, "generate_until", lambda self, requests, disable_tqdm=True: [" 1987"] * 2)

        reading = score(prepare(SUITE["quac"], open_data(str(tmp_path), base="x")), *student)

        assert [pytest.approx(2 / 3), 0] == list(reading.values)
        assert "real" == reading.items["quality.accuracy"][2]


def test_what_the_tests_of_a_program_need_runs_before_them_and_after_the_program():
    doc = {"test_setup_code": "root = Node(2)", "test_list": ["assert value(root) == 2"]}
    wrote = "class Node:\n    def __init__(self, v):\n        self.v = v\n\ndef value(node):\n    return node.v"

    asked = programs.CONFIGURATIONS["mbpp"]["process_results"](doc, [wrote])["pass@1"]

    assert [1.0, 0.0] == programs.passes([asked, programs.program(wrote, doc["test_list"])])
