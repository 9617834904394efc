"""Tasks from a folder: every form that is read, and what is refused with file and line."""

import json

import pytest
from checkpoints import says
from task_requests import built

from bench.data.sources import open_data
from bench.data.tasks.table import SUITE, choose
from bench.errors import DataError, NotAvailable
from bench.measure.scoring.prepare import prepare
from compression.errors import install_command


def test_every_model_is_shown_the_same_examples(shared):
    prepared = prepare(SUITE["gsm8k"], shared)

    first, again = ([request.args[0] for request in built(prepared, 3)] for _ in range(2))

    assert first == again
    assert 8 == first[0].count("\n\nQuestion:")
    assert first[0].partition("\n\n")[0] != first[1].partition("\n\n")[0]  # drawn for each question anew


@pytest.mark.parametrize(
    ("name", "parts", "items"),
    [("hellaswag", 1, 1000), ("arc_easy", 1, 2376), ("arc_challenge", 1, 1172), ("gsm8k", 1, 1319), ("boolq", 1, 3270),
     ("mmlu", 57, 14042), ("humaneval", 1, 164), ("winogrande", 1, 1267), ("piqa", 1, 1838), ("siqa", 1, 1954),
     ("openbookqa", 1, 500), ("commonsenseqa", 1, 1221), ("nq_open", 1, 3610), ("triviaqa", 1, 1000),
     ("gsm8k_maj8", 1, 1319), ("mbpp", 1, 500), ("bbh", 27, 6511), ("agieval", 9, 2852)],
)  # fmt: skip
def test_public_data_is_read_in_full(shared, name, parts, items):
    prepared = prepare(SUITE[name], shared, run_code=True)

    assert (parts, items) == (len(prepared.parts), sum(len(part.eval_docs) for part in prepared.parts.values()))


def test_the_seven_subjects_of_math_are_those_of_math_500(shared):
    pytest.importorskip("math_verify", reason=f"not installed: {install_command('math')}")

    prepared = prepare(SUITE["math"], shared)

    assert (7, 500) == (len(prepared.parts), sum(len(part.eval_docs) for part in prepared.parts.values()))


HELLASWAG = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": 1}
ARC = {"instruction": "Choose: Why? Answer1: so Answer2: thus Answer format: answer1/answer2", "answer": "answer2"}
AGIEVAL = {"passage": None, "question": "Why?", "options": ["(A)so", "(B)thus"], "label": "B"}
MBPP = {"task_id": 11, "text": "t", "code": "c", "test_list": ["assert f()"], "test_setup_code": ""}
TURNS = [
    {"question": "When?", "answers": [{"text": "in 1987"}, {"text": "1987"}], "orig_answer": {"text": "in 1987"}},
    {"question": "Who?", "answers": [{"text": "Ann"}, {"text": "Bob"}], "orig_answer": {"text": "Ann"}},
    {"question": "Why?", "answers": [{"text": "CANNOTANSWER"}], "orig_answer": {"text": "CANNOTANSWER"}},
]
QUAC = {"title": "T", "section_title": "S", "paragraphs": [{"context": "It fell in 1987.", "qas": TURNS}]}


class TestFolder:
    @pytest.mark.parametrize(
        ("name", "files", "words"),
        [
            ("hellaswag", {"hellaswag/val.jsonl": [HELLASWAG, {"ctx": 1}]},
             ("val.jsonl:2", "expected the columns activity_label", "found ctx")),
            ("hellaswag", {"hellaswag/val.jsonl": [HELLASWAG | {"endings": "d"}]},
             ("val.jsonl:1", "expected endings to be a list of texts", "'d'")),
            ("hellaswag", {"hellaswag/val.jsonl": [HELLASWAG | {"label": 2}]}, ("val.jsonl:1", "among 0, 1, found 2")),
            ("hellaswag", {"hellaswag/val.jsonl": "{"}, ("val.jsonl:1", "not JSON")),
            ("hellaswag", {"hellaswag/val.jsonl": ""}, ("HellaSwag has no row",)),
            ("hellaswag", {"hellaswag/val.jsonl": [HELLASWAG], "hellaswag/val2.jsonl": [HELLASWAG]},
             ("several files for HellaSwag", "keep one")),
            ("mmlu", {"mmlu/dev/abstract_algebra_dev.csv": "q,1,2,3,4,A\n",
                      "mmlu/test/abstract_algebra_test.csv": "q,1,2,3,4,A\nq,1,2,3,4\n"},
             ("abstract_algebra_test.csv:2", "expected 6 columns", "found 5")),
            ("mmlu", {"mmlu/dev/abstract_algebra_dev.csv": "q,1,2,3,4,E\n"},
             ("abstract_algebra_dev.csv:1", "among A, B, C, D, found 'E'")),
            ("gsm8k", {"gsm8k/train.jsonl": [{"question": "q", "answer": "4"}]},
             ("train.jsonl:1", "ends with ####", "'4'")),
            ("gsm8k", {"gsm8k/train.jsonl": [{"question": "q", "answer": "#### 4"}] * 9,
                       "gsm8k/test.jsonl": [{"question": q, "answer": "#### 4"} for q in "rq"]},
             ("row 2 of its test split is also row 9 of the train split", "remove one")),
            ("gsm8k", {"gsm8k/train.jsonl": [{"question": "q", "answer": "#### 4"}] * 7,
                       "gsm8k/test.jsonl": [{"question": "r", "answer": "#### 4"}]},
             ("8 examples are shown", "the train split has 7 rows", "give 8 or more")),
            ("arc_easy", {"commonsense8/ARC-Easy/test.json": [ARC, ARC | {"instruction": "Why?"}]},
             ("test.json: row 2", "expected a question and its options as Answer1:", "'Why?'")),
            ("arc_easy", {"commonsense8/ARC-Easy/test.json": [ARC | {"answer": "answer3"}]},
             ("row 1", "among answer1, answer2, found 'answer3'")),
            ("winogrande", {"commonsense8/winogrande/test.json": [
                {"instruction": "Fill: No blank. Option1: a Option2: b Answer format: x", "answer": "option1"}]},
             ("row 1", "expected a sentence with a blank")),
            ("agieval", {"agieval/v1/aqua-rat.jsonl": [AGIEVAL, AGIEVAL | {"label": "C"}]},
             ("aqua-rat.jsonl:2", "among A, B, found 'C'")),
            ("agieval", {"agieval/v1/aqua-rat.jsonl": [{"question": "Why?"}]},
             ("aqua-rat.jsonl:1", "expected the columns passage, question, options, label, found question")),
            ("mbpp", {"mbpp/mbpp.jsonl": [MBPP | {"test_setup_code": None}]},
             ("mbpp.jsonl:1", "expected test_setup_code to be str", "None")),
            ("quac", {"quac/val_v0.2.json": [QUAC | {"paragraphs": [{"context": "c", "qas": [{"question": "Q"}]}]}]},
             ("val_v0.2.json: row 1", "expected the columns question, answers, orig_answer, found question")),
        ],
    )  # fmt: skip
    def test_a_malformed_file_is_refused_with_line_expectation_and_find(self, name, files, words, tmp_path):
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            rows = content if isinstance(content, str) else (
                json.dumps(content) if path.endswith(".json") else "\n".join(map(json.dumps, content)))  # fmt: skip
            (tmp_path / path).write_text(rows)

        with pytest.raises(DataError, match=says(*words)):
            prepare(SUITE[name], open_data(str(tmp_path), base="x"), run_code=True)

    @pytest.mark.parametrize(
        ("row", "words"),
        [({"solution": "It is 4."}, ("jsonl:1", "its answer in \\boxed", "'It is 4.'")),
         ({"subject": "Poetry"}, ("jsonl:1", "among algebra, counting_and_probability", "found 'poetry'"))],
    )  # fmt: skip
    def test_a_malformed_problem_of_math_is_refused(self, row, words, tmp_path):
        pytest.importorskip("math_verify", reason=f"not installed: {install_command('math')}")
        (tmp_path / "math500").mkdir()
        problem = {"problem": "2+2?", "solution": "$\\boxed{4}$", "subject": "Algebra"}
        (tmp_path / "math500/test.jsonl").write_text(json.dumps(problem | row))

        with pytest.raises(DataError, match=says(*words)):
            prepare(SUITE["math"], open_data(str(tmp_path), base="x"))

    @pytest.mark.parametrize("name", [task.name for task in choose("full")])
    def test_a_task_whose_data_is_absent_is_not_available_and_says_what_is(self, name, tmp_path):
        with pytest.raises(NotAvailable, match=SUITE[name].title):
            prepare(SUITE[name], open_data(str(tmp_path), base="x"), run_code=True)

    def test_options_in_the_text_of_an_instruction_are_taken_apart(self, tmp_path):
        (tmp_path / "commonsense8/ARC-Easy").mkdir(parents=True)
        (tmp_path / "commonsense8/ARC-Easy/test.json").write_text(json.dumps([ARC]))

        requests = built(prepare(SUITE["arc_easy"], open_data(str(tmp_path), base="x")), 1)

        assert [("Question: Why?\nAnswer:", " so"), ("Question: Why?\nAnswer:", " thus")] == [r.args for r in requests]

    def test_a_passage_question_and_options_are_one_text_behind_examples_that_are_never_the_question(self, tmp_path):
        (tmp_path / "agieval").mkdir()
        rows = [AGIEVAL | {"passage": "It is. " if n == 4 else None, "question": f"Why {n}?"} for n in range(5)]
        for name in ("aqua-rat", "gaokao-english", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en",
                     "sat-en-without-passage", "sat-math"):  # fmt: skip
            (tmp_path / f"agieval/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

        prepared = prepare(SUITE["agieval"], open_data(str(tmp_path), base="x"))

        first, *_, last = built(prepared, 5)[: 2 * len(rows)]
        ask = "Q: Why {}? Answer Choices: (A)so (B)thus\nA: Among A through B, the answer is"
        shown = "".join(ask.format(n) + " (B)thus\n\n" for n in (1, 2, 3))
        assert (shown + ask.format(0), " (A)so") == first.args
        assert "".join(ask.format(n) + " (B)thus\n\n" for n in (0, 1, 2)) + "It is. " + ask.format(4) == last.args[0]

    def test_a_question_of_a_dialogue_stands_behind_those_before_it_and_disputed_ones_are_not_asked(self, tmp_path):
        (tmp_path / "quac").mkdir()
        (tmp_path / "quac/val_v0.2.json").write_text(json.dumps({"data": [QUAC]}))

        requests = built(prepare(SUITE["quac"], open_data(str(tmp_path), base="x")), None)

        head = "TITLE: T - S\nPARAGRAPH: It fell in 1987.\n\nQ: When?\n\nA:"
        assert [head, head + " in 1987\n\nQ: Who?\n\nA: Ann\n\nQ: Why?\n\nA:"] == [one.args[0] for one in requests]
        assert [["in 1987", "1987"], ["CANNOTANSWER"]] == [one.doc["truths"] for one in requests]
