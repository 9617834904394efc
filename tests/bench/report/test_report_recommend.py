"""Which recipe to take: fronts, limits and losses, and the committed baselines as a source."""

import math
from argparse import ArgumentTypeError

import pytest
from checkpoints import says
from hypothesis import given
from hypothesis import strategies as st
from report_rows import ACCURACY, BASELINES, PERPLEXITY, SIZE, row

from bench.__main__ import main as command
from bench.errors import BaselineError
from bench.report.fronts import dominates, front
from bench.report.orders import ORDERS
from bench.report.recommend import Limits, Point, points_of, recommend, share
from bench.report.sources import recorded
from bench.results.item_pairs import compare

numbers = st.integers(0, 4).map(float)
clouds = st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(numbers, numbers, numbers), max_size=8)


@given(clouds)
def test_a_point_is_on_the_front_exactly_if_no_other_dominates_it(points):
    """Against the definition, over all pairs."""
    found = front(points)

    for name, by in found.items():
        assert (by is None) == (not any(dominates(other, points[name]) for other in points.values()))
        assert by is None or (dominates(points[by], points[name]) and found[by] is None)


@pytest.mark.parametrize(("points", "words"), [
    ({"a": (1.0,), "b": (1.0, 2.0)}, ("'b'", "2 coordinates")),
    ({"a": (1.0, math.nan)}, ("'a'", "finite")),
])  # fmt: skip
def test_points_that_cannot_be_compared_are_refused(points, words):
    with pytest.raises(ValueError, match=says(*words)):
        front(points)


costs = st.floats(0.1, 9)
methods = st.lists(
    st.builds(Point, recipe=st.uuids().map(str), size=costs, loss=st.floats(-0.5, 3), latency=st.none() | costs,
              costs=st.just({})), max_size=12, unique_by=lambda point: point.recipe,
)  # fmt: skip
limits = st.builds(Limits, size=st.none() | costs, loss=st.none() | st.floats(0, 1), latency=st.none() | costs)


@given(methods, limits, st.sampled_from(["loss", "size", "latency"]))
def test_nothing_dominated_is_ever_recommended_and_limits_are_kept(points, limits, prefer):
    timed = limits.latency is not None or prefer == "latency"
    answer = recommend(points, limits, prefer)
    known = [point for point in points if not timed or point.latency is not None]

    for taken in (*answer.taken, *filter(None, [answer.nearest])):
        assert not any(dominates(point.coordinates(timed), taken.coordinates(timed)) for point in known)
    fitting = [point for point in known if not limits.excess(point)]
    assert bool(answer.taken) == bool(fitting)
    assert all(point in fitting for point in answer.taken)
    assert (answer.nearest is None) == (bool(fitting) or not known)
    if answer.taken and prefer != "loss":
        assert getattr(answer.taken[0], prefer) == min(getattr(point, prefer) for point in fitting)
    if answer.nearest:
        assert limits.excess(answer.nearest) == min(map(limits.excess, known))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(size=0.001), 2.0),  # also where sizes are far below one GiB
        (Limits(latency=0.004), 0.5),
        (Limits(loss=0.0), 5.0),  # as shares of one percent
        (Limits(loss=0.04), 0.25),
        (Limits(size=0.001, loss=0.04, latency=0.004), 2.0),
        (Limits(size=0.003), 0.0),
    ],
)
def test_what_is_exceeded_is_a_share_of_the_limit(limits, expected):
    point = Point(recipe="nf4", size=0.003, loss=0.05, latency=0.006, costs={})

    assert limits.excess(point) == pytest.approx(expected)


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.02", 0.02), ("0%", 0.0), ("150%", 1.5)])
def test_a_loss_is_a_share(text, value):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["2", "-1%", "nan", "two"])
def test_a_loss_that_is_no_share_is_refused(text):
    with pytest.raises(ArgumentTypeError, match=says("2%, or a number such as 0.02")):
        share(text)


def test_a_loss_is_of_the_bases_quality():
    rows = [row(SIZE, 1.0), row(PERPLEXITY, 2.2, base_value=2.0), row(ACCURACY, 0.6, base_value=0.8)]

    assert {"fp16": 0.0, "nf4": pytest.approx(0.1)} == {p.recipe: p.loss for p in points_of(
        [*rows, row(SIZE, 4.0, "fp16")], "perplexity")[0]}  # fmt: skip
    (point,) = [p for p in points_of(rows, "accuracy")[0] if p.recipe == "nf4"]
    assert point.loss == pytest.approx(0.25)
    assert ["fp16", "rtn"] == points_of([*rows, row(SIZE, 1.0, "rtn")], "accuracy")[1]  # of neither all is known


def test_the_committed_baselines_answer_right_after_a_clone(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command(["recommend", "--baselines", str(BASELINES), "--max-gb", "0.004", "--max-quality-loss", "2%"])
    shown = capsys.readouterr().out

    assert "timings and memory are those of cpu-" in shown
    named = [line.split(" | ")[0].removeprefix("| ") for line in shown.splitlines() if line.startswith("| ")][1:]
    points, _ = points_of(recorded(BASELINES), "perplexity")
    by = {point.recipe: point.coordinates(False) for point in points}
    assert named
    for name in named:
        assert by[name][0] <= 0.004
        assert by[name][1] <= 0.02
        assert front(by)[name] is None


def test_where_nothing_meets_the_limits_it_says_so_and_what_comes_nearest(capsys):
    command(["recommend", "--baselines", str(BASELINES), "--max-gb", "0.0001", "--max-quality-loss", "2%"])
    shown = capsys.readouterr().out

    assert "Nothing measured meets at most 0.0001 GiB and a loss of at most 2 %. Nearest is " in shown


@pytest.mark.parametrize(("arguments", "words"), [
    (["--journal", "none.jsonl"], "the journal none.jsonl does not exist"),
    (["--baselines", "none"], "none has no baselines"),
    (["--baselines", str(BASELINES), "--base", "else"], "no results for --base else; it has reference on cpu-"),
    (["--baselines", str(BASELINES), "--max-gb", "0"], "must be a number above 0"),
    (["--baselines", str(BASELINES), "--fastest", "--smallest"], "not allowed with"),
])  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_words(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command(["recommend", *arguments])

    assert words in " ".join(capsys.readouterr().err.split())


def test_recorded_rows_are_those_of_the_baselines_with_differences_paired_again():
    rows = recorded(BASELINES)
    nf4 = next(each for each in rows if each.recipe == "nf4" and each.metric == PERPLEXITY)
    plain = next(each for each in rows if each.recipe == "fp16" and each.key == nf4.key)

    assert nf4.paired == compare(nf4.items, plain.items).to_json()
    assert plain.paired is None
    assert {"fp16", "nf4", *ORDERS} <= {each.recipe for each in rows}


def test_no_baselines_are_said_to_be_none(tmp_path):
    with pytest.raises(BaselineError, match="with pytest bench --update-baselines"):
        recorded(tmp_path)


def test_of_several_recorded_bases_the_default_is_that_of_a_run(capsys):
    command(["recommend", "--baselines", str(BASELINES), "--max-gb", "0.0001"])
    shown = capsys.readouterr().out

    assert {"reference", "smollm2"} == {row.base for row in recorded(BASELINES)}
    assert shown.startswith("reference, from the baselines in ")
