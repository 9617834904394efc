"""`--plan`: the time of what was selected, from counts and timed batches."""

import re
from dataclasses import replace

import pytest
from commands import FILES, SIZE
from small_runs import make_base, options

from bench.data.tasks.table import SUITE
from bench.session import plan, time_plan
from bench.session.time_plan import Selected, Work, estimate
from compression import Recipe, locate

pytest_plugins = ["pytester"]

RTN, NF4 = "rtn(group_size=32)", "nf4(group_size=32)"
ONE_SECOND_A_WINDOW = Work(windows=1.0, read=0.01, written=0.1, stored_read=0.02, stored_written=0.2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


@pytest.fixture
def rates(monkeypatch):
    """Known seconds in the place of timed ones."""
    monkeypatch.setattr(time_plan._Estimator, "_rates", lambda self, work: ONE_SECOND_A_WINDOW)


def selected(*recipes, name="perplexity", **params):
    return [Selected(name, {"recipe": Recipe.parse(recipe), **params}) for recipe in recipes]


def estimated(base, tests, **given):
    chosen = options(base, "fp16", **given)
    return estimate(chosen, locate(chosen.base), tests)


def test_what_needs_no_time_of_quality_or_rag_opens_no_base(base, monkeypatch):
    monkeypatch.setattr(time_plan, "_Estimator", None)

    assert estimated(base, [*selected("fp16", name="size"), *selected("fp16", name="divergence")]) is None


def test_every_recipe_counts_its_windows_and_the_base_counts_once(base, rates):
    both = estimated(base, selected(RTN, NF4))
    beside = estimated(base, selected("fp16", RTN))

    assert {RTN: {"quality": 4.0}, NF4: {"quality": 4.0}} == both.recipes
    assert 4.0 == both.base
    assert {"fp16": {"quality": 4.0}, RTN: {"quality": 4.0}} == beside.recipes
    assert 0.0 == beside.base


def test_the_time_is_that_of_the_asked_windows(base, rates):
    protocol = {"name": "default", "samples": 2, "length": 32, "stride": None}

    assert {RTN: {"quality": 2.0}} == estimated(base, selected(RTN), protocol=protocol).recipes


def test_what_cannot_be_counted_is_named_and_the_rest_is_counted(base, rates):
    tests = [*selected(RTN), *selected(RTN, name="task", task=SUITE["piqa"])]

    found = estimated(base, tests)

    assert {RTN: {"quality": 4.0}} == found.recipes
    [words] = found.missing
    assert words.startswith("task: not counted:")
    assert "PIQA" in words


def test_rag_counts_questions_decodings_and_distractors_and_speed_for_both_models(monkeypatch, rates):
    from bench.measure.rag.pipeline import Setup

    rag = Setup(questions=4, seeds=3, top_k=2)
    chosen = replace(options(FILES.parent, "fp16"), base="reference", data=None, rag=rag, new_tokens=5, runs=2)

    def seconds(name, recipe="nf4", **params):
        tests = selected(recipe, name=name, **params)
        return estimate(chosen, locate("reference"), tests).recipes[recipe]["RAG"]

    greedy, sampled = seconds("answers", decoding="greedy"), seconds("answers", decoding="sampled")
    few, many = (seconds("distractors", distractors=count, gold="middle") for count in (2, 8))

    assert 4 * 2 * 5 * 0.1 < greedy
    assert sampled == pytest.approx(3 * greedy)
    assert few < many
    assert seconds("speed") == pytest.approx(2 * seconds("speed", recipe="fp16"))
    assert seconds("unanswerable") > 2 * 4 * 16 * 0.1


def test_real_batches_are_timed_one_as_a_warm_up(base, monkeypatch):
    windows = []

    def spy(model, tokenizer, data, protocol, *, progress, **named):
        windows.append(protocol.samples)
        return perplexity(model, tokenizer, data, protocol, progress=progress, **named)

    perplexity = time_plan.perplexity
    monkeypatch.setattr(time_plan, "perplexity", spy)

    found = estimated(base, selected(RTN))

    assert [time_plan.WINDOWS] == windows
    assert 0 < found.recipes[RTN]["quality"] < 600
    assert re.search(r"batches of tiny were timed in float32, in \d+ s", found.basis)


def test_a_batch_that_takes_long_is_timed_once(base, monkeypatch):
    monkeypatch.setattr(time_plan, "ENOUGH", -1.0)
    done = []

    def spy(*arguments, progress, **named):
        def noted(count, whole):
            done.append(count)
            progress(count, whole)

        return perplexity(*arguments, progress=noted, **named)

    perplexity = time_plan.perplexity
    monkeypatch.setattr(time_plan, "perplexity", spy)

    assert estimated(base, selected(RTN)).recipes[RTN]["quality"] > 0
    assert [1] == done


def test_the_plan_has_a_column_for_each_group_and_a_total(base, rates):
    tests = [*selected("fp16", RTN), *selected("fp16", RTN, name="energy", batch_size=1)]

    text = plan.plan(options(base, "fp16", RTN), tests)

    head, fp16, rtn, total, basis, *_ = text.splitlines()[1:]
    assert head.split()[-3:] == ["efficiency", "quality", "about"]
    assert [line.split()[-6:] for line in (fp16, rtn)] == [["10", "s", "4", "s", "14", "s"]] * 2
    assert "in total about 28 s" == total
    assert "counted" in basis


def test_efficiency_counts_the_selected_tests_alone(base):
    def about(*names):
        text = plan.plan(
            options(base, RTN), [each for name in names for each in selected(RTN, name=name, batch_size=1)]
        )
        return text.splitlines()[2].split()[-2:]

    assert ["0", "s"] == about("size")
    assert ["10", "s"] == about("energy")
    assert ["26", "s"] == about("energy", "memory")


def test_the_command_prints_the_time_of_quality_and_leaves_nothing(run, pytester, text_folder):
    tests = f"{FILES / 'test_quality.py'}::test_perplexity"
    result = run(tests, SIZE, "--model", f"fp16,{RTN}", "--data", text_folder, "--length", "64", "--plan")

    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*recipe*efficiency*quality*about*", "in total about *", "quality and RAG: *"])
    assert not (pytester.path / ".bench").exists()


@pytest.mark.parametrize(("seconds", "words"), [(12.4, "12 s"), (100, "2 min"), (7100, "118 min"), (9000, "2.5 h")])
def test_times_are_said_in_a_fitting_unit(seconds, words):
    assert words == plan._time(seconds)
