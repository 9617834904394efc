"""Which recipes a run has: `--set`, lists of the suite's own that go on where a recipe cannot be, and their sizes."""

import dataclasses
import re

import pytest
from commands import FILES, RTN, SIZE
from hypothesis import given
from hypothesis import strategies as st
from small_runs import make_base, one_run, options

from bench.errors import JournalError
from bench.metrics import size
from bench.results.journal import Journal, read
from bench.session.session import Workbench
from compression import Recipe, RecipeError, list_methods, parse_setting

pytest_plugins = ["pytester"]

NAMES = sorted(list_methods())


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), st.sampled_from([64, 128]), st.sampled_from([64, 256]))
def test_a_setting_reaches_every_step_that_has_the_parameter_and_leaves_it_at_its_default(names, own, value):
    def text(name, group):
        known = "group_size" in {field.name for field in dataclasses.fields(list_methods()[name])}
        return f"{name}(group_size={group})" if known and group is not None else name

    default = {name: getattr(list_methods()[name](), "group_size", None) for name in names}
    recipe = Recipe.parse("-".join(text(name, own if i % 2 else None) for i, name in enumerate(names)))
    left = [own if i % 2 and own != default[name] else value for i, name in enumerate(names)]

    wanted = Recipe.parse("-".join(text(name, group) for name, group in zip(names, left, strict=True)))
    assert wanted == recipe.with_settings({"group_size": value})
    assert recipe == recipe.with_settings({})


def test_a_setting_keeps_what_a_layer_has_of_its_own():
    recipe = Recipe.parse('rtn(layers={"*.down_proj":{"bits":8},"*.up_proj":{"group_size":32}})')

    [step] = recipe.with_settings({"group_size": 64}).steps

    assert [64, 64, 32] == [
        step.for_layer(name).group_size for name in ("model.layers.0.q_proj", "0.down_proj", "0.up_proj")
    ]
    assert 8 == step.for_layer("0.down_proj").bits


@pytest.mark.parametrize(
    "text", ["", "group_size", "group_size=", "=3", "group_size=64,bits=3", "group_size=64)", "A=1"]
)
def test_a_setting_that_is_not_of_its_form_is_refused(text):
    with pytest.raises(RecipeError, match=r"expected|empty"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nf4", "--set", "group_sizes=64"), "no method of nf4 has the parameter 'group_sizes'; they have"),
        (("--model", "nf4", "--set", "group_size"), "--set group_size: "),
        (("--model", "nf4", "--set", "group_size=64", "--set", "group_size=32"), "group_size is given twice"),
        (("--model", "nf4", "--set", "group_size=65"), "nf4(group_size=65): allowed are 32, 64"),
        (("--model", "nf4,fp16", "--set", "bits=3"), "no method of nf4, fp16 has the parameter 'bits'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_measured(run, pytester, arguments, words):
    result = run(SIZE, *arguments)

    assert result.ret in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED)
    assert words in result.stdout.str() + result.stderr.str()
    assert not (pytester.path / ".bench" / "journal.jsonl").exists()


def test_a_setting_of_the_whole_run_names_the_recipes_anew_and_keeps_what_tables_show(run):
    shown = run(FILES, "--model", "report", "--set", "group_size=32", "--collect-only", "-q").stdout.str()

    assert {"fp16", "nf4(group_size=32)", "sparsegpt", "structured"} == set(
        re.findall(r"::test_recovery\[(.*)\]", shown)
    )
    assert "[p-kd-nf4(group_size=32)]" in shown


def test_of_all_methods_those_that_cannot_be_have_rows_that_say_why_and_the_others_are_measured(run, pytester):
    result = run(SIZE, "--model", "all", "--set", "group_size=32")

    rows = read(pytester.path / ".bench" / "journal.jsonl").rows_of()
    result.assert_outcomes(passed=len(NAMES) + 1)
    reasons = {row.recipe: row.reason for row in rows if row.status == "not_available"}
    assert {"gptq(group_size=32)", "awq(group_size=32)", "sparsegpt", "wanda", "kd", "recover"} <= reasons.keys()
    assert "gptq(group_size=32) needs calibration text" in reasons["gptq(group_size=32)"]
    measured = {row.recipe for row in rows if row.value is not None}
    assert {"fp16", "rtn(group_size=32)", "nf4(group_size=32)", "hqq(group_size=32)", "magnitude"} <= measured
    assert not measured & reasons.keys()
    assert len(NAMES) + 1 == len(measured | reasons.keys())


def test_of_recipes_written_out_one_that_cannot_be_refuses_the_run(run, pytester):
    result = run(SIZE, "--model", f"{RTN},gptq(group_size=32)")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*gptq(group_size=32) needs calibration text*"])
    assert not (pytester.path / ".bench").exists()


@pytest.mark.parametrize("option", ["--calibration", "--teacher", "--downstream"])
def test_what_was_given_and_cannot_be_opened_refuses_also_a_list(run, option):
    result = run(SIZE, "--model", "all", "--set", "group_size=32", option, "nowhere")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "nowhere" in result.stderr.str()


def test_the_plan_of_a_list_says_what_is_not_available(run):
    result = run(SIZE, "--model", "all", "--set", "group_size=32", "--plan")

    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*rtn(group_size=32)*MiB*", "gptq(group_size=32): not available: *calibration*"])


def test_a_run_that_measures_quality_alone_records_what_it_compressed(tmp_path):
    make_base(tmp_path)
    from bench import test_quality

    run = one_run(tmp_path, "fp16", RTN, measurements={"perplexity": test_quality.test_perplexity})

    assert [] == run.failing
    assert {"artefact", "perplexity"} == {row.of for row in run.rows.values() if row.recipe == RTN}
    assert {"perplexity"} == {row.of for row in run.rows.values() if row.recipe == "fp16"}


def test_a_size_that_no_test_is_for_is_gated(tmp_path, monkeypatch):
    make_base(tmp_path)
    from bench import test_quality

    measured = {"measurements": {"perplexity": test_quality.test_perplexity}}
    one_run(tmp_path, RTN, **measured, update=True)
    assert [] == one_run(tmp_path, RTN, **measured).failing

    monkeypatch.setattr(size, "stored", lambda model, stored=size.stored: stored(model) + 1)
    failing = "\n".join(one_run(tmp_path, RTN, **measured).failing)
    assert "efficiency.stored_bytes" in failing


def test_a_size_that_grew_before_a_run_was_interrupted_fails_the_run_that_goes_on(tmp_path, monkeypatch):
    make_base(tmp_path)
    from bench import test_quality

    measured = {"measurements": {"perplexity": test_quality.test_perplexity}}
    one_run(tmp_path, RTN, **measured, update=True)
    with monkeypatch.context() as grown:
        grown.setattr(size, "stored", lambda model, stored=size.stored: stored(model) + 1)
        stopped = Workbench(options(tmp_path, RTN))
        test_quality.test_perplexity(stopped, Recipe.parse(RTN))
        assert stopped.finish(passed=True, interrupted=True)
        stopped.close()

    again = one_run(tmp_path, RTN, **measured, resume=True)
    assert again.rows[RTN, "efficiency.stored_bytes"].run == stopped.journal.run
    assert "efficiency.stored_bytes" in "\n".join(again.failing)


def test_a_size_that_cannot_be_written_is_no_failure_of_the_next_recipe(tmp_path, monkeypatch):
    make_base(tmp_path)
    from bench import test_quality

    recipes = (RTN, "rtn(bits=8,group_size=32)")
    workbench, append = Workbench(options(tmp_path, *recipes)), Journal.append
    test_quality.test_perplexity(workbench, Recipe.parse(recipes[0]))

    def full(journal, record):
        if getattr(record, "of", None) == "artefact":
            monkeypatch.undo()
            raise JournalError("the disk is full")
        append(journal, record)

    monkeypatch.setattr(Journal, "append", full)
    test_quality.test_perplexity(workbench, Recipe.parse(recipes[1]))
    assert {"ok"} == {row.status for row in workbench.rows.values()}
    assert "the disk is full" in "\n".join(workbench.finish(passed=True))
    workbench.close()
    assert {"artefact", "perplexity"} == {row.of for row in read(workbench.options.journal).rows()}


def test_a_recorded_recipe_of_a_list_that_cannot_be_any_more_fails_in_every_measurement(tmp_path):
    make_base(tmp_path)
    one_run(tmp_path, RTN, update=True)

    run = one_run(tmp_path, RTN, named=True, refused={RTN: "it is gone"})
    failing = "\n".join(run.failing)
    assert {"not_available"} == {row.status for row in run.rows.values()}
    assert all(f"{metric}[" in failing for metric in ("quality.perplexity", "quality.kl_to_base"))
    assert "efficiency.stored_bytes" in failing
    assert [] == one_run(tmp_path, "nf4", named=True, refused={"nf4": "it is not recorded"}).failing


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("0.5", 0.5), ("true", True), ("none", None), ("row", "row"), ("2:4", "2:4")]
)
def test_the_value_of_a_setting_is_written_as_in_a_recipe(text, value):
    assert ("name", value) == parse_setting(f"name={text}")
