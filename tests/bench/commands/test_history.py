"""Steps in a series are found where they are, and not where there are none; and the commit is named."""

import json
from itertools import permutations

import numpy as np
import pytest
from checkpoints import says
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from bench.commands.history import LEVEL, Point, Series, main, moves, of_journal, of_storage
from bench.errors import JournalError
from bench.metrics import all_metrics
from bench.results.journal import Journal
from bench.results.row import Row
from bench.statistics.level_change import LEAST, WIDTHS, cut, steps, strongest

NOISE = {
    "normal": lambda numbers, size: numbers.normal(1, 0.01, size),
    "heavy tails": lambda numbers, size: 1 + 0.01 * numbers.standard_cauchy(size),
    "two clocks": lambda numbers, size: numbers.choice([1, 1.3], size) * numbers.normal(1, 0.001, size),
    "bursts": lambda numbers, size: np.where(numbers.random(size) < 0.1, 2, 1) * numbers.normal(1, 0.01, size),
    "few values": lambda numbers, size: numbers.integers(0, 3, size).astype(float),
}


def series(values, *, exact=False, floor=0.0, better="lower", commits=None, contexts=None, **facts):
    commits = commits or [f"c{number:011}" for number in range(len(values))]
    contexts = contexts or [{}] * len(values)
    points = zip(range(len(values)), commits, map(float, values), contexts, strict=True)
    named = {"base": "reference", "recipe": "nf4", "device": "cpu", "key": "efficiency.decode_ms", "unit": "ms"} | facts
    return Series(exact=exact, floor=floor, better=better, points=tuple(Point(*each) for each in points), **named)


# --- Steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 6, 7])
def test_of_all_orders_of_a_series_no_larger_share_is_as_striking_as_p_says(count):
    found = np.array([strongest(order).p for order in permutations(range(count))])

    assert [] == [p for p in np.unique(found) if np.mean(found <= p) > p * (1 + 1e-9)]
    assert found.min() < 1


@pytest.mark.parametrize("shape", NOISE)
def test_where_nothing_moved_anything_is_named_at_most_as_often_as_is_said(shape):
    numbers = np.random.default_rng(0)
    histories = [[NOISE[shape](numbers, 30) for _ in range(20)] for _ in range(300)]

    alarms = sum(cut([strongest(each).p for each in history], LEVEL) > 0 for history in histories)

    expected = LEVEL * len(histories)
    assert alarms <= expected + 3 * expected**0.5


def test_noise_that_depends_on_what_was_before_is_not_covered_by_that():
    numbers = np.random.default_rng(0)
    warming = [np.linspace(0, 0.1, 30) + numbers.normal(1, 0.01, 30) for _ in range(20)]
    assert cut([strongest(each).p for each in warming], LEVEL) > 0


@pytest.mark.parametrize(("shape", "runs", "least"), [("normal", 30, 95), ("heavy tails", 60, 80), ("bursts", 60, 80)])
def test_a_step_is_found_among_twenty_series_and_at_its_place(shape, runs, least):
    numbers = np.random.default_rng(0)
    place = 3 * runs // 5
    distances = []
    for _ in range(100):
        history = [series(NOISE[shape](numbers, runs), recipe=f"still-{number}") for number in range(19)]
        moved = series(NOISE[shape](numbers, runs) + 0.1 * (np.arange(runs) >= place))
        places = [abs(move.place - place) for move in moves([*history, moved]) if move.series is moved]
        distances += [min(places)] if places else []

    assert len(distances) >= 95
    assert sum(distance <= 1 for distance in distances) >= least


def test_a_level_that_came_and_went_is_two_steps():
    values = np.random.default_rng(0).normal(1, 0.01, 45)
    values[15:30] += 0.1
    assert [15, 30] == [found.place for found in steps(list(values), LEVEL)]


@pytest.mark.parametrize("count", [12, 30])
def test_the_most_striking_window_is_that_of_the_slow_test_of_each(count):
    values = np.random.default_rng(count).normal(size=count) + (np.arange(count) >= count // 2)
    alone = {}
    for place in range(LEAST, count - LEAST + 1):
        for width in WIDTHS:
            before, behind = values[max(0, place - width) : place], values[place : place + width]
            alone[place, width] = mannwhitneyu(before, behind, method="exact").pvalue
    found = strongest(list(values))
    (place, _), least = min(alone.items(), key=lambda each: each[1])

    assert place == found.place
    assert least <= found.p <= least * len(alone)


distinct = st.lists(st.floats(-100, 100, width=16), unique=True, min_size=6, max_size=40)


@given(distinct)
def test_only_the_order_of_the_values_counts(values):
    assert strongest(values) == strongest([sorted(values).index(value) ** 3 for value in values])


@given(distinct)
def test_backwards_a_series_is_as_striking(values):
    assert strongest(values).p == pytest.approx(strongest(values[::-1]).p)


@given(st.lists(st.floats(-1e9, 1e9), max_size=3))
def test_too_short_a_series_has_no_step(values):
    assert (None, []) == (strongest(values), steps(values, 0.5))


@given(st.lists(st.floats(0, 1), max_size=30))
def test_series_that_move_together_help_each_other_and_one_alone_pays_for_all(probabilities):
    alone = cut([0.001, *probabilities], LEVEL)
    assert alone >= cut([*probabilities, 1.0], LEVEL) or alone == 0.0
    assert 0.001 <= cut([0.001] * (len(probabilities) + 1) + probabilities, LEVEL)


# --- What is named ---------------------------------------------------------------------------------------------------


def test_a_count_moved_wherever_it_differs_and_the_commit_is_named_with_what_else_did():
    contexts = [{"torch": "2.13"}, {"torch": "2.13"}, {"torch": "2.14"}]
    sizes = series([100, 100, 101], exact=True, key="efficiency.stored_bytes", unit="B", contexts=contexts)

    (move,) = moves([sizes])

    assert move.words({"c00000000002": "Store zeros"}) == (
        "nf4: efficiency.stored_bytes worse: 100 -> 101 B (+1 %) at commit c00000000002 (Store zeros), "
        "1970-01-01 00:00; the run before was of c00000000001; 2 runs before, 1 since; "
        "also different: torch '2.13' -> '2.14'"
    )


@pytest.mark.parametrize(
    ("commits", "words"),
    [
        (["a" * 12, "b" * 12, "b" * 12], "within commit bbbbbbbbbbbb: not the code"),
        (["a" * 12, "b" * 12, None], "of no known commit"),
    ],
)
def test_a_move_that_no_commit_made_is_said_to_be_none(commits, words):
    (move,) = moves([series([1, 1, 2], exact=True, commits=commits)])
    assert words in move.words()


def test_what_is_smaller_than_the_floor_of_its_metric_is_no_move():
    values = [*np.linspace(1, 1.001, 15), *np.linspace(1.01, 1.011, 15)]
    assert 1 == len(moves([series(values)]))
    assert [] == moves([series(values, floor=0.05)])


@pytest.mark.parametrize(("better", "direction"), [("lower", "worse"), ("higher", "better"), ("neither", "moved")])
def test_the_direction_is_that_of_the_metric(better, direction):
    (move,) = moves([series([1, 2], exact=True, better=better)])
    assert direction == move.direction


# --- From the files --------------------------------------------------------------------------------------------------


def runs(path, speeds, *, size_from=None):
    """A journal of one run for each speed of nf4, of a commit each; fp16 takes 4 ms; sizes grow from a place on."""
    metrics = all_metrics()

    def row(run, name, value, **facts):
        known = metrics[name]
        own = {"unit": known.unit, "better": known.better, "of": known.of, "seed": 0, "base": "reference"}
        return Row(run=run, recipe="nf4", device="cpu-1t", metric=name, value=value, **own, **facts)

    for number, speed in enumerate(speeds):
        with Journal(path) as lines:
            lines.start({"commit": f"{number:012x}", "torch": "2.13.0", "data_hash": {}})
            slow = 1 + number % 3  # the machine's own clock
            ratio = {"ratio": speed / 4, "base_value": 4.0 * slow, "params": {"batch": 1}}
            lines.append(row(lines.run, "efficiency.decode_ms", speed * slow, **ratio))
            grown = size_from is not None and number >= size_from
            lines.append(row(lines.run, "efficiency.stored_bytes", 101.0 if grown else 100.0))
            failed = row(lines.run, "efficiency.mfu", None, status="failed", reason="?")
            lines.append(failed)
            lines.end("passed")
    return path


def test_the_command_names_the_commit_at_which_a_metric_moved(tmp_path, capsys):
    speeds = np.random.default_rng(0).normal(2, 0.02, 24) + 0.3 * (np.arange(24) >= 14)
    journal = runs(tmp_path / "journal.jsonl", speeds, size_from=20)

    main(["--journal", str(journal), "--storage", str(tmp_path / "none")])

    said = capsys.readouterr().out.splitlines()
    assert "2 series of up to 24 runs, 2 changed; false-alarm rate at most 1 %" == said[0]
    assert said[1].startswith("nf4: efficiency.stored_bytes worse: 100 -> 101 B (+1 %) at commit 000000000014")
    assert said[2].startswith("nf4: efficiency.decode_ms[batch=1] worse: 0.5")
    assert " of fp16 (+" in said[2]
    assert " at commit 00000000000e," in said[2]
    assert "14 runs before, 10 since, p 0.0000" not in said[2]

    main(["--journal", str(journal), "--storage", str(tmp_path / "none"), "--metric", "decode_ms", "--last", "5"])
    said = capsys.readouterr().out.splitlines()
    assert "1 series of up to 5 runs, 0 changed" in said[0]
    assert 5 == sum("2026" in line or line.startswith("  20") for line in said)


def test_rows_without_a_value_are_no_points_and_ratios_are_followed_where_there_are_any(tmp_path):
    found = {each.metric: each for each in of_journal(runs(tmp_path / "journal.jsonl", [2.0, 2.0, 2.0]))}

    assert {"efficiency.decode_ms", "efficiency.stored_bytes"} == set(found)
    assert [0.5, 0.5, 0.5] == found["efficiency.decode_ms"].values
    assert (True, False) == (found["efficiency.stored_bytes"].exact, found["efficiency.decode_ms"].exact)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "holds results; run pytest bench"),
        (("--level", "0"), "--level must be above 0 and below 1, not 0"),
        (("--last", "0"), "--last must be at least 1, not 0"),
        (("--model", "rnt"), "did you mean rtn"),
        (("--metric", "shoe_size"), "no stored result matches these"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_with_words(tmp_path, capsys, arguments, words):
    journal = tmp_path / "journal.jsonl" if not arguments else runs(tmp_path / "journal.jsonl", [2.0])
    with pytest.raises(SystemExit) as end:
        main(["--journal", str(journal), "--storage", str(tmp_path / "none"), *arguments])
    assert 2 == end.value.code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop("datetime"),
        lambda table: table.update(commit_info=None),
        lambda table: table["benchmarks"][0]["stats"].update(median=float("nan")),
        lambda table: table["benchmarks"][0].pop("stats"),
    ],
)
def test_a_damaged_file_of_the_storage_is_refused_by_name(tmp_path, change):
    benchmark = {"fullname": "test_a.py::test_a", "name": "test_a", "group": None, "stats": {"median": 2.0}}
    table = {
        "datetime": "2026-11-22T10:00:00+00:00", "commit_info": {"id": "a" * 40}, "benchmarks": [benchmark],
        "machine_info": {"node": "host", "machine": "x86_64", "python_version": "3.11.7"},
    }  # fmt: skip
    path = tmp_path / "Linux" / "0001_a.json"
    path.parent.mkdir()
    path.write_text(json.dumps(table))
    (found,) = of_storage(tmp_path)
    assert ([2.0], "a" * 12, "benchmark.median_s") == (found.values, found.points[0].commit, found.metric)

    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(JournalError, match=says(str(path), "not a result of pytest-benchmark")):
        of_storage(tmp_path)
