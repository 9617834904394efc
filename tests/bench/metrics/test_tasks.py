"""The suite of tasks: its table, the reference's stand-ins, tables of scores, and the command."""

import json
import random
import shutil

import pytest
from checkpoints import says, transformers_model
from commands import FILES, pytest_bench
from task_requests import built

import bench.measure.scoring.lm_eval
import bench.measure.scoring.stand_ins
import bench.session.session  # noqa: F401
from bench.data.sources import open_data
from bench.data.tasks.table import SUITE, choose
from bench.errors import NotAvailable, OptionError
from bench.measure.scoring.prepare import prepare
from bench.metrics.tasks import SuiteReading, accuracy_drop, average_accuracy, suite_of
from bench.reference import tasks
from bench.report.tables import tables
from bench.results.row import Row
from compression.checkpoints.base import byte_tokenizer

pytest_plugins = ["pytester"]

QUALITY = FILES / "test_quality.py"
STAND_INS = {task.name: task.stand_in for task in SUITE.values() if task.stand_in}
EMBEDDED = open_data("embedded", base="reference")

pytestmark = pytest.mark.usefixtures("imported")


class TestSuite:
    def test_the_core_is_that_of_the_paper(self):
        assert [
            ("HellaSwag", 0, "acc_norm"), ("ARC-Easy", 0, "acc_norm"), ("ARC-Challenge", 0, "acc_norm"),
            ("GSM8K", 8, "exact_match"), ("MMLU", 5, "acc"), ("HumanEval", 0, "pass@1"),
        ] == [(task.title, task.shots, task.metric) for task in choose("core")]  # fmt: skip

    def test_the_full_suite_is_19_benchmarks_in_20_rows(self):
        assert 20 == len(choose("full"))
        assert 19 == len({task.title.removesuffix(" maj@8") for task in choose("full")})

    def test_the_full_suite_has_the_shots_metrics_and_votes_of_mistrals(self):
        assert {
            "HellaSwag": (0, "acc_norm", 1), "Winogrande": (0, "acc", 1), "PIQA": (0, "acc_norm", 1),
            "SIQA": (0, "acc", 1), "OpenbookQA": (0, "acc_norm", 1), "ARC-Easy": (0, "acc_norm", 1),
            "ARC-Challenge": (0, "acc_norm", 1), "CommonsenseQA": (0, "acc", 1),
            "NaturalQuestions": (5, "exact_match", 1), "TriviaQA": (5, "exact_match", 1), "BoolQ": (0, "acc", 1),
            "QuAC": (0, "f1", 1), "GSM8K": (8, "exact_match", 1), "GSM8K maj@8": (8, "exact_match", 8),
            "MATH": (4, "exact_match", 4), "HumanEval": (0, "pass@1", 1), "MBPP": (3, "pass@1", 1),
            "MMLU": (5, "acc", 1), "BBH": (3, "exact_match", 1), "AGIEval": (3, "acc", 1),
        } == {task.title: (task.shots, task.metric, task.votes) for task in choose("full")}  # fmt: skip

    def test_names_are_taken_in_their_order_once(self):
        assert ["piqa", "mmlu"] == [task.name for task in choose("piqa, mmlu,piqa")]

    @pytest.mark.parametrize(
        ("text", "words"),
        [("helaswag", ("'helaswag'", "hellaswag")), ("arc", ("'arc'", "arc_easy")), ("zzz", ("'zzz'", "core, full")),
         ("", ("''", "hellaswag"))],
    )  # fmt: skip
    def test_an_unknown_name_is_refused_with_those_like_it(self, text, words):
        with pytest.raises(OptionError, match=says(*words)):
            choose(text)


class TestStandIns:
    @pytest.mark.parametrize("name", STAND_INS)
    def test_prompts_shots_and_answers_are_those_that_the_reference_was_taught(self, name):
        prepared = prepare(SUITE[name], EMBEDDED, run_code=True)
        requests = built(prepared, 20)

        items = {item["id"]: item for item in tasks.items(STAND_INS[name], "test")}
        assert {instance.doc["id"]: tasks.prompt(items[instance.doc["id"]]) for instance in requests} == {
            instance.doc["id"]: instance.args[0] for instance in requests
        }
        assert tasks.SHOTS.get(STAND_INS[name], 0) == SUITE[name].shots
        for instance in requests:
            if instance.request_type == "loglikelihood":
                assert items[instance.doc["id"]]["choices"][instance.idx] == instance.args[1]

    def test_a_task_without_one_says_so(self):
        with pytest.raises(NotAvailable, match=says("PIQA", "no stand-in for it", "--data hub or a folder")):
            prepare(SUITE["piqa"], EMBEDDED)

    def test_code_is_run_only_where_that_is_allowed(self):
        with pytest.raises(NotAvailable, match="only with --allow-code-execution"):
            prepare(SUITE["humaneval"], EMBEDDED)


class TestTables:
    def rows(self):
        facts = {"run": "r", "base": "reference", "device": "d", "unit": "share", "better": "higher", "seed": 0}
        for recipe, share in (("fp16", 0.8), ("nf4", 0.7)):
            base = None if recipe == "fp16" else 2.5
            yield Row(**facts, recipe=recipe, metric="quality.perplexity", of="perplexity", base_value=base,
                      value=2.75 if base else 2.5, ratio=1.1 if base else None)  # fmt: skip
            for task in choose("core"):
                lost = task.name == "humaneval"
                yield Row(**facts, recipe=recipe, metric="quality.accuracy", of="task", params={"task": task.name},
                          value=None if lost else share, base_value=None if recipe == "fp16" or lost else 0.8,
                          status="not_available" if lost else "ok", reason="no code" if lost else None)  # fmt: skip

    def test_the_table_has_every_column_of_the_papers_and_says_what_could_not_be_had(self):
        performance, average = (table for table in tables(self.rows()) if table.number.startswith("E"))

        assert ("E20", "E21") == (performance.number, average.number)
        assert ("Perplexity", *(task.column for task in choose("core"))) == performance.columns
        cells = dict(zip(performance.columns, performance.lines[1].cells, strict=True))
        assert 0.7 == cells["MMLU (5-shot)"].value
        assert "not available" == cells["HumanEval (0-shot)"].text
        assert "no code" == performance.notes[cells["HumanEval (0-shot)"].note - 1]
        place = average.columns.index("Perplexity Increase (%)")
        assert [0, pytest.approx(10)] == [line.cells[place].value for line in average.lines]

    def test_the_average_and_its_drop_are_over_the_tasks_that_have_a_score(self):
        reading = suite_of(self.rows(), "nf4")

        assert 5 == len(reading.accuracies)
        assert average_accuracy(reading) == pytest.approx(0.7)
        assert accuracy_drop(reading) == pytest.approx(0.1)
        assert 0 == accuracy_drop(suite_of(self.rows(), "fp16"))

    def test_no_score_is_no_average(self):
        with pytest.raises(NotAvailable, match="no task was scored"):
            suite_of([], "nf4")

    def test_a_drop_is_paired_by_task(self):
        draw = random.Random(0)
        base = {name: draw.random() for name in SUITE}
        assert accuracy_drop(SuiteReading(accuracies=dict(reversed(base.items())), base=base)) == pytest.approx(0)


class TestCommand:
    @pytest.fixture
    def run(self, pytester):
        def call(*arguments):
            return pytest_bench(pytester, QUALITY, "--model", "fp16,rtn(bits=2)", "--data", "embedded", *arguments)

        return call

    def test_tasks_are_scored_beside_the_base_and_what_could_not_be_has_a_reason(self, run, pytester):
        result = run("--tasks", "hellaswag,humaneval,piqa", "--limit", "12", "-k", "task or average", "-v")

        result.assert_outcomes(passed=8)
        result.stdout.fnmatch_lines([
            "*HellaSwag (0-shot)*HumanEval (0-shot)*",
            "*rtn(bits=2)*0.4167*not available*",
            "*Average Accuracy*Accuracy Drop*Tasks Evaluated*",
            "*PIQA (0-shot)*",
            "*rtn(bits=2)*not available*",
            "*HumanEval: programs of the model are run only with --allow-code-execution*",
            "*PIQA: the embedded reference has no stand-in for it*",
        ])  # fmt: skip
        rows = [json.loads(line) for line in (pytester.path / ".bench" / "journal.jsonl").read_text().splitlines()]
        scored = {
            row["recipe"]: row for row in rows if row.get("metric") == "quality.accuracy" and row["value"] is not None
        }
        assert {"fp16", "rtn(bits=2)"} == set(scored)
        assert scored["rtn(bits=2)"]["base_value"] == scored["fp16"]["value"] > scored["rtn(bits=2)"]["value"]
        assert scored["rtn(bits=2)"]["items"]["kind"] == "binary"

    def test_prompts_that_exceed_the_context_are_counted_and_shown(self, run, pytester):
        base = pytester.path / "base"
        transformers_model("LlamaForCausalLM", vocab_size=258).save_pretrained(base)
        byte_tokenizer().save_pretrained(base)

        result = run("--base", base, "--model", "fp16", "--tasks", "mmlu", "--limit", "6", "-k", "task",
                     "--prompt-tokens", "8", "--max-new-tokens", "8")  # fmt: skip

        result.assert_outcomes(passed=1)
        said = "6 prompts of MMLU exceed the context: their beginning was left out"
        result.stdout.fnmatch_lines([f"*{said}*"])
        assert said in (pytester.path / ".bench" / "journal.jsonl").read_text()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [(("--tasks", "mmlv"), "*did you mean mmlu*"), (("--limit", "0"), "*--limit must be at least 1, not 0*"),
         (("--task-rows", "-1"), "*--task-rows must be at least 1, not -1*")],
    )  # fmt: skip
    def test_options_that_cannot_be_are_refused_before_any_work(self, run, pytester, arguments, words):
        result = run(*arguments)

        (result.stderr if result.ret == pytest.ExitCode.USAGE_ERROR else result.stdout).fnmatch_lines([words])
        assert not (pytester.path / ".bench").exists()

    def test_malformed_data_is_refused_before_any_work(self, run, pytester):
        folder = pytester.path / "data"
        (folder / "hellaswag").mkdir(parents=True)
        (folder / "test.txt").write_text("Some text to measure perplexity on. " * 200)
        (folder / "hellaswag" / "val.jsonl").write_text('{"ctx": 1}')

        result = run("--data", folder, "--tasks", "hellaswag")

        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*val.jsonl:1: expected the columns*"])
        shutil.rmtree(folder)
