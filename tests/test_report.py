"""Tables, fronts, recommendation, digest and files from made-up rows whose answer is known; nothing needs a model."""

import json
import math
import random
from argparse import ArgumentTypeError
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from checkpoints import says
from hypothesis import given
from hypothesis import strategies as st

import bench
from bench.__main__ import main as command
from bench._errors import BaselineError, JournalError, OptionError
from bench.items import Items, hashes_of
from bench.journal import Contents, Journal, read
from bench.metrics import all_metrics
from bench.orderings import BEGINNINGS, ORDERS
from bench.paired import compare
from bench.report import formats, recipes
from bench.report._cells import interval, median_interval
from bench.report._layout import FAMILIES, JUDGED, family_of, layouts
from bench.report.digest import LIMIT, digest
from bench.report.fronts import dominates, front
from bench.report.papers import PAPERS
from bench.report.recommend import Limits, Point, points_of, recommend, share
from bench.report.sources import recorded
from bench.report.tables import newest, tables
from bench.report.write import chosen, writable, write
from bench.rows import Row

BASELINES = Path(bench.__file__).parents[1] / "baselines"
SIZE, PERPLEXITY, ACCURACY = "efficiency.model_size_gb", "quality.perplexity", "quality.average_accuracy"
LATENCY, F1 = "efficiency.latency_ms", "rag.f1"
LOAD = {"batch": 1, "mode": "eager"}


def row(metric, value, recipe="nf4", **facts):
    """A row of a real metric; `ratio` follows from `base_value`."""
    known = all_metrics()[metric]
    facts = {"run": "r1", "base": "reference", "device": "cpu-test", "seed": 0} | facts
    if facts.get("base_value") and value is not None:
        facts["ratio"] = value / facts["base_value"]
    return Row(**facts, recipe=recipe, metric=metric, value=value, unit=known.unit, better=known.better, of=known.of)


def cells(table):
    return {line.name: dict(zip(table.columns, line.cells, strict=True)) for line in table.lines}


def table_of(rows, number, family=None):
    [found] = [each for each in tables(rows) if each.number == number and family in (None, each.family)]
    return found


# --- fronts -----------------------------------------------------------------------------------------------------------

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


# --- which tables, lines and rows -------------------------------------------------------------------------------------


def test_every_table_of_results_of_the_paper_is_there_once():
    found = [layout.number for family in FAMILIES for layout in layouts(family) if layout.number.startswith("E")]

    assert [f"E{number}" for number in range(14, 41)] == sorted(found)


def test_every_column_is_a_metric_that_there_is():
    columns = {column.metric for family in FAMILIES for layout in layouts(family) for column in layout.columns}

    assert columns <= set(all_metrics())


def test_every_column_of_the_judges_tables_is_a_metric_that_there_is():
    pytest.importorskip("bench.metrics.judge")

    assert {column.metric for layout in JUDGED for column in layout.columns} <= set(all_metrics())


@pytest.mark.parametrize(("text", "family"), [
    ("fp16", None), ("nf4", "quantization"), ("gptq(bits=3)", "quantization"), ("p", "pruning"),
    ("nf4-structured", "pruning"), ("kd", "distillation"), ("p-kd-nf4", "orderings"), ("wanda-nf4", "orderings"),
    ("sparsegpt-recover", "pruning"), ("recover", "distillation"), ("awq-rtn", "quantization"),
])  # fmt: skip
def test_a_recipe_has_the_family_of_its_steps(text, family):
    assert family_of(text) == family


def test_of_several_runs_the_last_row_of_each_base_recipe_device_and_key_counts():
    rows = [row(SIZE, 1.0), row(SIZE, 2.0, run="r2"), row(SIZE, 3.0, base="other")]

    assert [2.0, 3.0] == [each.value for each in newest(rows)]


def test_rows_of_two_devices_are_refused():
    with pytest.raises(ValueError, match="several bases or devices"):
        tables([row(SIZE, 1.0), row(SIZE, 1.0, device="other")])


def test_the_base_stands_first_with_what_was_measured_of_it_beside_a_recipe():
    table = table_of([row(SIZE, 3.84, base_value=13.49)], "E14")

    assert [("fp16", 13.49), ("nf4", 3.84)] == [(line.name, line.cells[0].value) for line in table.lines]


def test_its_own_rows_come_before_those_beside_a_recipe():
    rows = [row(LATENCY, 5.0, base_value=9.0, params=LOAD), row(LATENCY, 8.0, "fp16", params=LOAD)]

    assert 8.0 == cells(table_of(rows, "E14"))["fp16"]["Latency (ms/tok)"].value


def test_a_recipe_has_a_line_for_each_way_of_decoding_and_batch_size():
    ways = [{"decoding": "greedy"}, {"decoding": "sampled", "seeds": 3}]
    loads = [{"batch": 1, "mode": "eager"}, {"batch": 2, "mode": "eager"}]
    rows = [row(F1, 0.5 + at / 10, params=way) for at, way in enumerate(ways)]
    rows += [row(LATENCY, 4.0 + at, params=load) for at, load in enumerate(loads)] + [row(SIZE, 1.0, base_value=2.0)]

    assert {"nf4 (greedy)": 0.5, "nf4 (sampled)": 0.6} == {
        name: line["F1"].value for name, line in cells(table_of(rows, "E26")).items() if name.startswith("nf4")
    }
    efficiency = cells(table_of(rows, "E14"))
    assert [4.0, 5.0] == [efficiency[f"nf4 (batch {n}, eager)"]["Latency (ms/tok)"].value for n in (1, 2)]
    assert {1.0} == {line["Size (GiB)"].value for name, line in efficiency.items() if name.startswith("nf4")}


def test_a_column_is_of_one_condition_and_the_rest_is_told():
    """Of 4 samples the perplexity is another one: the newest row is not put among those of 100."""
    rows = [row(PERPLEXITY, 2.5, recipe, params={"samples": 100}) for recipe in ("fp16", "nf4", "rtn")]
    rows += [row(PERPLEXITY, 9.0, recipe, params={"samples": 4}) for recipe in ("nf4", "hqq")]

    table = table_of(rows, "E20")

    assert [2.5, 2.5, 2.5, None] == [cells(table)[name]["Perplexity"].value for name in ("fp16", "rtn", "nf4", "hqq")]
    assert "not measured" == cells(table)["hqq"]["Perplexity"].text
    assert "samples=100" in table.remarks[0]
    assert "2 values under other conditions are in the results, not here; hqq under those alone" in table.remarks[1]


def test_text_and_teacher_belong_to_a_recipe_not_to_the_conditions():
    rows = [row(SIZE, 3.0, "kd", params={"teacher": "self"}), row(SIZE, 4.0, "distilled", params={"teacher": "big"})]

    assert [3.0, 4.0] == [cells(table_of(rows, "E18"))[name]["Size (GiB)"].value for name in ("kd", "distilled")]


def test_first_steps_of_an_order_have_no_line_unless_more_is_known_of_them():
    rows = [row(SIZE, 1.0, recipe) for recipe in ("p", "kd", "nf4", "p-kd", "p-kd-nf4")]

    assert ["fp16", "nf4", "p", "kd", "p-kd-nf4"] == [line.name for line in table_of(rows, "as E14").lines]
    rows.append(row(LATENCY, 1.0, "p-kd", params=LOAD))
    assert "p-kd" in cells(table_of(rows, "as E14"))


def test_table_1_of_the_orders_has_the_base_the_steps_and_the_orders():
    rows = [row(SIZE, 1.0, recipe) for recipe in ("fp16", "nf4", "p", "kd", *ORDERS, "wanda", "wanda-nf4")]

    assert ["fp16", "nf4", "p", "kd", *ORDERS] == [line.name for line in table_of(rows, "O1").lines]


# --- cells ------------------------------------------------------------------------------------------------------------


def test_a_cell_that_could_not_be_measured_says_why():
    rows = [row(SIZE, 1.0), row(LATENCY, None, status="out_of_memory", reason="3 GiB were wanted", params=LOAD)]

    table = table_of(rows, "E14")
    cell = cells(table)["nf4"]["Latency (ms/tok)"]

    assert ("out of memory", None) == (cell.text, cell.value)
    assert "3 GiB were wanted" == table.notes[cell.note - 1]


def test_a_table_of_which_nothing_could_be_had_is_there_and_says_why():
    table = table_of([row(F1, None, params={"decoding": "greedy"}, status="not_available", reason="no text")], "E26")

    assert "not available" == cells(table)["nf4"]["F1"].text
    assert "no text" in table.notes


def test_a_newer_failure_stands_in_place_of_an_older_value_but_not_being_unavailable():
    older = row(LATENCY, 4.0, params={**LOAD, "new_tokens": 128})
    failed = row(LATENCY, None, params=LOAD, status="failed", reason="broken", run="r2")
    without = replace(failed, status="not_available")

    assert "failed" == cells(table_of([older, row(SIZE, 1.0), failed], "E14"))["nf4"]["Latency (ms/tok)"].text
    assert "4" == cells(table_of([older, row(SIZE, 1.0), without], "E14"))["nf4"]["Latency (ms/tok)"].text
    assert "4" == cells(table_of([failed, row(SIZE, 1.0), older], "E14"))["nf4"]["Latency (ms/tok)"].text


def test_what_was_not_measured_names_the_command_that_measures_it():
    table = table_of([row(SIZE, 1.0), row(SIZE, 2.0, "gptq(bits=3)"), row(LATENCY, 4.0, params=LOAD)], "E14")

    assert "not measured" == cells(table)["gptq(bits=3)"]["Latency (ms/tok)"].text
    assert "not measured: `pytest bench -m efficiency --model 'fp16,nf4,gptq(bits=3)'` measures it." in table.remarks
    assert "pytest bench -m efficiency --model 'fp16,nf4,gptq(bits=3)'" == table.command


def test_another_base_is_in_the_command():
    table = table_of([row(SIZE, 1.0, base="my model")], "E14")

    assert table.command.endswith("--base 'my model'")


def test_no_cell_of_any_table_is_empty():
    for table in tables(recorded(BASELINES)):
        for line in (*table.lines, *table.elsewhere):
            assert len(line.cells) == len(table.columns)
            assert all(cell.text.strip() for cell in line.cells)


def test_the_best_of_the_compressed_models_is_marked_in_the_better_direction():
    rows = [row(SIZE, value, recipe, base_value=9.0) for recipe, value in (("nf4", 3.0), ("rtn", 2.0))]
    rows += [row("efficiency.throughput", value, recipe, params=LOAD, base_value=90.0)
             for recipe, value in (("nf4", 30.0), ("rtn", 20.0))]  # fmt: skip

    found = cells(table_of(rows, "E14"))

    assert [False, False, True] == [found[name]["Size (GiB)"].best for name in ("fp16", "nf4", "rtn")]
    assert [False, True, False] == [found[name]["Throughput (tok/s)"].best for name in ("fp16", "nf4", "rtn")]


def test_where_all_are_alike_or_no_direction_is_better_nothing_is_marked():
    rows = [row(SIZE, 3.0, recipe) for recipe in ("nf4", "rtn")]
    rows += [row("efficiency.parameters", value, recipe) for recipe, value in (("nf4", 30.0), ("rtn", 20.0))]

    assert not any(cell.best for table in tables(rows) for line in table.lines for cell in line.cells)


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "low", "high"), [(6, 0, 5), (8, 0, 7), (9, 1, 7), (10, 1, 8), (20, 5, 14)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(count, low, high):
    """Order statistics from tables of the sign test (Conover, Practical Nonparametric Statistics, table A3)."""
    samples = tuple(float(each) for each in random.Random(0).sample(range(count), count))

    assert (low, high) == median_interval(samples)


def test_five_samples_say_too_little_of_a_median():
    assert median_interval((1.0, 2.0, 3.0, 4.0, 5.0)) is None


def paired_row(metric, own, base, **facts):
    """A row with results per item on both sides; its value is what the metric is of their mean."""
    hashes = hashes_of(range(len(own)))
    now, then = Items(hashes, own, "real"), Items(hashes, base, "real")
    of = math.exp if all_metrics()[metric].of_items == "exp" else float
    return row(metric, of(now.mean), base_value=of(then.mean), items=now, paired=compare(now, then).to_json(), **facts)


def test_an_interval_from_results_per_item_is_that_of_the_difference_at_the_bases_value():
    draw = random.Random(0)
    base = [draw.uniform(0, 2) for _ in range(40)]
    found = paired_row(PERPLEXITY, [value + 0.1 + draw.gauss(0, 0.01) for value in base], base)

    low, high = interval(found)

    assert low < found.value < high
    assert high - low < 0.02 * found.value  # windows differ by far more than the models
    assert found.base_value < low


def test_an_increase_has_its_interval_in_percent():
    base = [0.5] * 20
    table = table_of([paired_row(PERPLEXITY, [0.5 + math.log(1.1)] * 20, base)], "E21")
    cell = cells(table)["nf4"]["Perplexity Increase (%)"]

    assert (cell.value, cell.low, cell.high) == pytest.approx((10, 10, 10), abs=1e-4)
    assert 0 == cells(table)["fp16"]["Perplexity Increase (%)"].value


def test_a_share_has_no_interval_beyond_0_and_1():
    found = paired_row(F1, [0.0] * 12, [1.0] * 2 + [0.0] * 10, params={"decoding": "greedy"})

    low, high = interval(found)

    assert 0 <= low <= high <= 1


# --- the papers -------------------------------------------------------------------------------------------------------


def test_the_papers_figures_are_those_in_print():
    """The reference points that the specification repeats."""
    e, o = PAPERS["E"].figures, PAPERS["O"].figures

    assert (13.49, 62.48, 15.97, 3061.60) == tuple(
        e["fp16"][head] for head in ("Size (GiB)", "Latency (ms/tok)", "Throughput (tok/s)", "Energy (mJ/tok)")
    )
    assert (0.133, 0.333, 0.065, 0.137, 0.437, -0.029) == tuple(
        e["nf4"][head] for head in ("F1", "Faithfulness", "Relevance", "ROUGE-L", "BERTScore F1", "F1 Improvement")
    )
    assert {"nf4-kd-p": 24.069, "kd-nf4-p": 53.366, "nf4-p-kd": 34.494, "p-kd-nf4": 5.048} == {
        order: o[order]["Perplexity"] for order in ("nf4-kd-p", "kd-nf4-p", "nf4-p-kd", "p-kd-nf4")
    }
    assert set(ORDERS) < set(o)


def test_every_figure_of_a_paper_has_a_column():
    heads = {column.head for family in FAMILIES for layout in layouts(family) for column in layout.columns}
    heads |= {"G-Eval", "Prompt Alignment", "Clarity", "Size (MiB)"}

    for paper in PAPERS.values():
        assert {head for line in paper.figures.values() for head in line} <= heads


def test_on_the_papers_base_its_figures_stand_among_the_lines():
    rows = [row(SIZE, value, recipe, base="mistralai/Mistral-7B-Instruct-v0.1") for recipe, value in
            (("fp16", 13.49), ("nf4", 3.84))]  # fmt: skip

    table = table_of(rows, "E14")

    assert ["fp16", None, "nf4", None] == [line.recipe if line.source is None else None for line in table.lines]
    assert [13.49, 13.49, 3.84, 3.74] == [line.cells[0].value for line in table.lines]
    assert "without the scales" in table.notes[table.lines[3].cells[0].note - 1]
    assert not table.elsewhere


def test_on_another_base_they_stand_apart():
    table = table_of([row(SIZE, 0.0033, base_value=0.0098)], "E14")

    assert all(line.source is None for line in table.lines)
    assert [13.49, 3.74] == [line.cells[0].value for line in table.elsewhere]
    assert "another base, Mistral-7B-Instruct-v0.1" in table.remarks[-1]


def test_random_weights_of_the_papers_shape_share_its_speed_and_not_its_quality():
    rows = [row(SIZE, 3.84, base="random:mistral-7b"), row(PERPLEXITY, 1e4, base="random:mistral-7b")]

    assert any(line.source == "E" for line in table_of(rows, "E14").lines)
    assert not any(line.source == "E" for line in table_of(rows, "E20").lines)


def test_a_papers_figure_is_never_the_best():
    rows = [row(SIZE, value, recipe, base="random:mistral-7b") for recipe, value in (("nf4", 3.84), ("hqq", 4.0))]

    marked = [line for line in table_of(rows, "E14").lines if line.cells[0].best]

    assert [("nf4", None)] == [(line.recipe, line.source) for line in marked]


# --- formats ----------------------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    """Rows of cells as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.values, self._open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self._open = tag in ("td", "th") or (self._open and tag in ("strong", "sup"))
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.values += [float(value) for name, value in attrs if name == "data-value"]

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data


def test_markdown_latex_and_html_have_the_same_cells():
    rows = [row(SIZE, 3.25, "nf4", base_value=13.5), row(SIZE, 2.0, "rtn(bits=3,group_size=64)", base_value=13.5)]
    table = table_of(rows, "E14")

    markdown = [line for line in formats.markdown(table).splitlines() if line.startswith("| ")]
    latex = [line for line in formats.latex(table).splitlines() if line.endswith(r"\\")]
    html = Cells(formats.html(table))

    assert len(markdown) == len(latex) == len(html.rows) == 1 + 3
    assert "**2**" in markdown[3]
    assert r"rtn(bits=3,group\_size=64) & \textbf{2} &" in latex[3]
    assert ["rtn(bits=3,group_size=64)", "2"] == html.rows[3][:2]
    assert [13.5, 3.25, 2.0] == html.values


def test_what_other_formats_would_read_as_markup_stays_text():
    reason = "a | b <script>alert(1)</script> 5 % of $x_1$ {y} & *z* \\ end\nnext"
    table = table_of([row(SIZE, 1.0), row(LATENCY, None, status="failed", reason=reason, params=LOAD)], "E14")

    assert "<script>" not in formats.html(table)
    assert r"5 \% of \$x\_1\$ \{y\} \& *z* \textbackslash{} end next" in formats.latex(table)
    assert "a \\| b &lt;script>" in formats.markdown(table)


def test_a_command_is_set_as_one_in_latex():
    rows = [row(SIZE, 1.0, base="mine"), row(SIZE, 1.0, "rtn", base="mine"), row(LATENCY, 2.0, base="mine")]

    shown = formats.latex(table_of(rows, "E14"))

    assert r"\texttt{pytest bench -m efficiency -{}-model fp16,rtn,nf4 -{}-base mine} measures it." in shown


def test_a_terminal_sees_what_was_measured_alone():
    shown = formats.text(table_of([row(SIZE, 1.0, base_value=2.0)], "E14"))

    assert "Size (GiB)" in shown
    assert "Latency" not in shown


# --- recipes of the report --------------------------------------------------------------------------------------------


def test_first_steps_of_orders_are_measured_as_far_as_the_table_of_orders_needs():
    assert {*BEGINNINGS, *ORDERS, "fp16", "p", "kd", "nf4"} <= set(recipes.ALL)
    assert len(set(recipes.ALL)) == len(recipes.ALL)
    for recipe in BEGINNINGS:
        assert recipes.has_a_line(recipe, {"efficiency", "ordering"})
        assert not recipes.has_a_line(recipe, {"efficiency"})
    assert recipes.has_a_line("nf4", {"recovery"})
    assert not recipes.has_a_line("gptq", {"recovery"})


# --- recommendation ---------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.02", 0.02), ("0%", 0.0), ("150%", 1.5)])
def test_a_loss_is_a_share(text, value):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["2", "-1%", "nan", "two"])
def test_a_loss_that_is_no_share_is_refused(text):
    with pytest.raises(ArgumentTypeError, match=says("2%, or 0.02")):
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
    (["--journal", "none.jsonl"], "there is no journal none.jsonl"),
    (["--baselines", "none"], "there are no baselines in none"),
    (["--baselines", str(BASELINES), "--base", "else"], "no results for --base else; there is reference on cpu-"),
    (["--baselines", str(BASELINES), "--max-gb", "0"], "must be a number above 0"),
    (["--baselines", str(BASELINES), "--fastest", "--smallest"], "not allowed with"),
])  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_words(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command(["recommend", *arguments])

    assert words in " ".join(capsys.readouterr().err.split())


# --- digest and files -------------------------------------------------------------------------------------------------


def contents_of(rows, verdicts=(), ending="passed"):
    records = [{"kind": "run", "run": "r1", "time": 0, "context": {"commit": "abc123"}}]
    records += [{"kind": "row", "time": 1, **each.to_json()} for each in rows]
    records += [
        {
            "kind": "verdict",
            "run": "r1",
            "time": 2,
            "recipe": "nf4",
            "key": f"k{at}",
            "outcome": outcome,
            "words": f"nf4: k{at} {outcome}: {'x' * length}",
        }
        for at, (outcome, length) in enumerate(verdicts)
    ]
    records += [{"kind": "end", "run": "r1", "time": 3, "status": ending}] if ending else []
    return Contents(records=records, torn=[], writing=frozenset())


def test_verdicts_come_first_then_what_moved_then_the_numbers():
    rows = [row(SIZE, 0.5, base_value=1.0), row(LATENCY, None, status="failed", reason="no such kernel", params=LOAD)]
    text = digest(contents_of(rows, [("pass", 3), ("improved", 3), ("regressed", 3), ("pass", 3)], "failed"))

    order = ["failed", "commit abc123", "1 regressed, 1 improved, 2 pass", "**Fails**", "k2 regressed", "**Moved**",
             "k1 improved", "| nf4 | 512 (0.5x)", "no such kernel"]  # fmt: skip
    assert sorted(order, key=text.index) == order
    assert "k0" not in text
    assert len(text.splitlines()) < 40


def test_a_digest_of_the_worst_run_fits_a_comment():
    names = ["rtn", *(f"gptq(bits=3,group_size={2**at})" for at in range(3, 9)), *ORDERS, *BEGINNINGS]
    rows = [row(metric, 1.0, recipe, params={"load": at}) for metric in (SIZE, PERPLEXITY, ACCURACY)
            for recipe in names for at in range(20)]  # fmt: skip
    rows += [row(LATENCY, None, name, status="failed", reason=f"{name} " * 200, params=LOAD) for name in names]
    text = digest(contents_of(rows, [("regressed", 1500), ("improved", 1500)] * 2000))

    assert len(text) < LIMIT
    assert "and 1992 more" in text
    assert len(text.splitlines()) < 60


def test_a_run_that_gated_nothing_and_has_not_ended_says_so():
    text = digest(contents_of([row(SIZE, 1.0)], ending=None))

    assert "has not ended" in text
    assert "Nothing was gated" in text


def test_nobody_is_named_and_no_markup_comes_through_a_verdict():
    rows = [row(LATENCY, None, status="failed", reason="@someone <img src=x>", params=LOAD)]

    text = digest(contents_of([*rows, row(SIZE, 1.0)]))

    assert "@someone" not in text
    assert "<img" not in text


def test_a_journal_without_results_has_no_digest():
    with pytest.raises(JournalError, match="holds no results of run r9"):
        digest(contents_of([row(SIZE, 1.0)]), "r9")


def test_the_files_hold_every_row_and_the_tables_every_value(tmp_path):
    import pandas as pd

    rows = [row(SIZE, 0.5, base_value=1.0), row(LATENCY, 4.0, params=LOAD, samples=(3.0, 4.0, 5.0)),
            row(F1, None, params={"decoding": "greedy"}, status="not_available", reason="no questions")]  # fmt: skip

    written = write(tmp_path / "report", rows, contents_of(rows))

    names = {path.name for path in written}
    assert {"tables.md", "tables.tex", "tables.html", "summary.md", "results.json", "results.csv",
            "results.parquet"} <= names  # fmt: skip
    found = json.loads((tmp_path / "report/results.json").read_text())
    assert [(each.key, each.value, each.reason) for each in rows] == [
        (each["key"], each["value"], each["reason"]) for each in found
    ]
    for frame in (pd.read_parquet(tmp_path / "report/results.parquet"), pd.read_csv(tmp_path / "report/results.csv")):
        assert [each.key for each in rows] == list(frame["key"])
        assert [0.5, 4.0] == list(frame["value"].dropna())
        assert [3.0, 4.0, 5.0] == json.loads(frame["samples"][1])
    assert [path.name for path in (tmp_path / "report").iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(OptionError, match=says("--report", "file", "choose another folder")):
        writable(tmp_path / "file")


def test_of_a_journal_with_several_devices_the_last_one_is_meant_or_the_one_asked_for():
    rows = [row(SIZE, 1.0, device="one"), row(SIZE, 2.0, device="two")]

    assert [2.0] == [each.value for each in chosen(rows, None, None, "j")]
    assert [1.0] == [each.value for each in chosen(rows, None, "one", "j")]
    with pytest.raises(JournalError, match=says("--device three", "reference on one; reference on two")):
        chosen(rows, None, "three", "j")


def test_the_command_writes_the_report_of_a_journal(tmp_path, capsys):
    with Journal(tmp_path / "journal.jsonl", run="r1") as journal:
        journal.start({"commit": None})
        journal.append(row(SIZE, 0.5, base_value=1.0))
        journal.end("passed")
    command(["report", "--journal", str(tmp_path / "journal.jsonl"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/summary.md").read_text() == digest(read(tmp_path / "journal.jsonl"))

    capsys.readouterr()
    command(["report", "--journal", str(tmp_path / "journal.jsonl"), "--tables", "E14"])
    assert "### Table E14" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command(["report", "--journal", str(tmp_path / "journal.jsonl"), "--tables", "E99"])
    assert "--tables E99: there are E14" in capsys.readouterr().err


def test_a_journal_with_a_recipe_that_is_none_any_more_is_refused_with_words(tmp_path, capsys):
    with Journal(tmp_path / "journal.jsonl", run="r1") as journal:
        journal.append(row(SIZE, 0.5, "gone(bits=4)"))
    with pytest.raises(SystemExit, match="2"):
        command(["report", "--journal", str(tmp_path / "journal.jsonl")])

    assert "gone" in capsys.readouterr().err


# --- baselines as a source --------------------------------------------------------------------------------------------


def test_recorded_rows_are_those_of_the_baselines_with_differences_paired_again():
    rows = recorded(BASELINES)
    nf4 = next(each for each in rows if each.recipe == "nf4" and each.metric == PERPLEXITY)
    plain = next(each for each in rows if each.recipe == "fp16" and each.key == nf4.key)

    assert nf4.paired == compare(nf4.items, plain.items).to_json()
    assert plain.paired is None
    assert {"fp16", "nf4", *ORDERS} <= {each.recipe for each in rows}


def test_no_baselines_are_said_to_be_none(tmp_path):
    with pytest.raises(BaselineError, match="--update-baselines records them"):
        recorded(tmp_path)


# --- what the new columns measure -------------------------------------------------------------------------------------


def test_zeros_are_counted_in_dense_and_sparse_layers_alike():
    import torch
    from torch import nn

    from bench.metrics.size import ArtefactReading, sparsity, zeros
    from compression._sparse_linear import SparseLinear

    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 4.0, 5.0]])
    dense = nn.Linear(4, 2, bias=False)
    dense.weight = nn.Parameter(weight)
    counted = [zeros(nn.Sequential(layer)) for layer in (dense, SparseLinear.from_weight(weight, None))]

    assert [3, 3] == counted
    reading = ArtefactReading(stored_bytes=1, parameters=8, base_stored_bytes=1, base_parameters=16, zeros=3)
    assert sparsity(reading) == pytest.approx(11 / 16)
