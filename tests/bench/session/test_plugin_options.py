"""The command before it measures: what it refuses, collects and plans, and the status that it ends with."""

import re
import shutil
from itertools import pairwise

import pytest
from commands import FILES, PERPLEXITY, RTN, SIZE

from bench.session.exit_status import EXIT_STATUSES

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "rnt"), "did you mean rtn"),
        (("--model", "rtn(bits=9)"), "allowed are 2, 3, 4, 5, 6, 7, 8"),
        (("--model", RTN, "--base", "no-such-base"), "no such folder"),
        (("--model", "rtn"), "divisors near it: 24, 32, 48, 96"),
        (("--model", RTN, "--batch-size", "0"), "such as 1,2,4,8), not 0"),
        (("--model", RTN, "--runs", "0"), "--runs must be at least 1, not 0"),
        (("--model", RTN, "--max-new-tokens", "1"), "at least 2"),
        (("--model", RTN, "--device", "tpu"), "--device must be auto, cpu, cuda or cuda:N, not tpu"),
        (("--model", RTN, "--device", "cpu:0"), "--device must be auto, cpu, cuda or cuda:N, not cpu:0"),
        (("--model", RTN, "--chat-template-args", "enable_thinking"), "give name=value separated by commas"),
        (("--model", RTN, "--chat-template-args", "a=1,a=2"), "each name once"),
        (("--model", RTN, "--chat-template-args", '["a"]'), "or a JSON object"),
        (("--model", RTN, "--chat-template-args", "tokenize=true"), "tokenize must be left out: the benchmarks set it"),
        (("--model", RTN, "--chat-template-args", "depth=1"), "the tokenizer has no chat template"),
        (("--model", RTN, "--tdp", "-5"), "--tdp must be a finite number of watts above 0, not -5"),
        (("--model", RTN, "--tdp", "nan"), "--tdp must be a finite number of watts above 0, not nan"),
        (("--model", RTN, "--journal", "/dev/null/journal.jsonl"), "cannot be written"),
        (("--model", RTN, "--against", "HEAD"), "--against HEAD: no selected test generates against a commit"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_before_anything_is_measured(run, pytester, arguments, words):
    result = run(SIZE, *arguments)
    assert result.ret in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED)
    assert words in result.stdout.str() + result.stderr.str()
    assert not (pytester.path / ".bench" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((SIZE, "--model", RTN), 0),
        ((SIZE, "--model", RTN, "--gate", "strict"), 1),
        ((FILES / "test_efficiency.py", "--model", "rnt"), 2),
        ((SIZE, "--model", RTN, "--base", "no-such-base"), 4),
        ((SIZE, "--model", RTN, "-k", "nothing"), 5),
    ],
    ids=["passed", "gate", "cannot be collected", "refused", "nothing to run"],
)
def test_the_exit_status_says_how_a_run_ended_as_the_reference_tells(run, arguments, status):
    page = (FILES.parent / "docs" / "reference" / "exit-status.md").read_text()
    told = re.findall(r"^\| (\d) \|", page, flags=re.MULTILINE)

    assert [str(each) for each in EXIT_STATUSES] == told
    assert status in EXIT_STATUSES
    assert status == run(*arguments).ret


def test_data_that_is_not_there_is_said_before_anything_is_measured(run, tmp_path):
    result = run(PERPLEXITY, "--model", RTN, "--data", tmp_path)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert str(tmp_path) in result.stderr.str()


def test_each_recipe_is_compressed_once_and_its_measurements_follow_each_other(run):
    result = run(
        FILES / "test_efficiency.py", FILES / "test_quality.py", "--collect-only", "-q", "--model", f"fp16,{RTN}",
        "--tasks", "piqa,mmlu",
    )  # fmt: skip
    collected = [line for line in result.stdout.lines if "::test_" in line]
    changes = sum(("fp16" in a) != ("fp16" in b) for a, b in pairwise(collected))
    assert len(collected) == 20
    assert changes == 1


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(run, pytester):
    (pytester.path / "out").write_text("in the way")
    result = run(SIZE, "--model", RTN, "--report", "out")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--report out: *choose another folder*"])
    assert not (pytester.path / ".bench").exists()


def test_of_the_first_steps_of_an_order_the_report_measures_size_and_perplexity_alone(run):
    shown = run(str(FILES), "--model", "report", "--collect-only", "-q").stdout.str()

    assert {"test_size", "test_perplexity"} == set(re.findall(r"::(\w+)\[p-kd\]", shown))
    assert {"test_answers", "test_generation", "test_average"} <= set(re.findall(r"::(\w+)\[[^]]*p-kd-nf4", shown))
    assert {"fp16", "nf4", "sparsegpt", "structured"} == set(re.findall(r"::test_recovery\[(.*)\]", shown))


def test_the_plan_is_printed_and_nothing_is_run(run, pytester):
    result = run(SIZE, "--model", f"fp16,{RTN}", "--plan")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*recipe*stored*memory at once*", "*fp16*", f"*{RTN.replace('[', '[[]')}*"])
    assert not (pytester.path / ".bench").exists()


def test_a_plan_for_a_truncated_checkpoint_says_that_it_is_damaged(run, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    result = run(SIZE, "--model", RTN, "--plan", "--base", broken)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"{weights} is damaged or not safetensors" in result.stderr.str()
