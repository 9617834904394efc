"""Tables of the report from made-up rows whose answer is known: which there are, their lines, their cells."""

from dataclasses import replace

import pytest
from report_rows import BASELINES, F1, LATENCY, LOAD, PERPLEXITY, SIZE, cells, row, table_of

from bench.metrics import all_metrics
from bench.report import recipe_lists
from bench.report.layout import FAMILIES, JUDGED, family_of, layouts, requested
from bench.report.orders import BEGINNINGS, ORDERS
from bench.report.sources import recorded
from bench.report.tables import newest, tables


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
    with pytest.raises(ValueError, match="one base and device"):
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
    assert "2 values under other conditions are in the results only; hqq under those alone" in table.remarks[1]


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


@pytest.mark.parametrize("base", ["reference", "smollm2"])
def test_no_cell_of_any_table_is_empty(base):
    rows = [row for row in recorded(BASELINES) if row.base == base]
    assert rows
    for table in tables(rows):
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


def test_first_steps_of_orders_are_measured_as_far_as_the_table_of_orders_needs():
    assert {*BEGINNINGS, *ORDERS, "fp16", "p", "kd", "nf4"} <= set(recipe_lists.ALL)
    assert len(set(recipe_lists.ALL)) == len(recipe_lists.ALL)
    for recipe in BEGINNINGS:
        assert recipe_lists.has_a_line(recipe, {"efficiency", "ordering"})
        assert not recipe_lists.has_a_line(recipe, {"efficiency"})
    assert recipe_lists.has_a_line("nf4", {"recovery"})
    assert not recipe_lists.has_a_line("gptq", {"recovery"})


def test_a_table_says_what_the_recipes_are_and_what_their_texts_leave_out():
    table = table_of([row(SIZE, 1.0, "gptq"), row(SIZE, 1.0, "gptq(symmetric=true)")], "S0")

    grids = {name: line["Grid"].text for name, line in cells(table).items()}
    assert {"gptq": "4 bits in groups of 128, asymmetric",
            "gptq(symmetric=true)": "4 bits in groups of 128, symmetric"} == grids  # fmt: skip
    assert "act_order=true, static_groups=true" in cells(table)["gptq"]["Parameters"].text
    assert "128 x 512 tokens" == cells(table)["gptq"]["Calibration Text"].text


def test_the_control_of_distillation_stands_beside_it():
    rows = [row(PERPLEXITY, 2.0, recipe) for recipe in ("kd", "kd(alpha=0.0)", *ORDERS)]

    assert {"kd", "kd(alpha=0.0)"} <= set(cells(table_of(rows, "O1")))
    assert "kd(alpha=0.0)" in recipe_lists.ALL and recipe_lists.has_a_line("kd(alpha=0.0)", {"ordering"})


def test_of_the_reference_it_is_said_that_its_outliers_are_planted():
    [table] = [each for each in tables([row(PERPLEXITY, 2.0)]) if each.number == "E20"]
    [other] = [each for each in tables([row(PERPLEXITY, 2.0, base="mine")]) if each.number == "E20"]

    assert any("is artificial" in remark for remark in table.remarks)
    assert not any("is artificial" in remark for remark in other.remarks)


def test_of_requests_at_rates_each_engine_and_rate_has_a_line():
    asked = {"runtime": "vllm", "batch": 32, "requests": 64}
    rows = [
        row("efficiency.rate_throughput", 100.0 * rate, params=asked | {"rate": rate}, base_value=50.0 * rate)
        for rate in (1.0, 4.0)
    ]
    rows += [row("efficiency.rate_ttft_p99_ms", 9.0, params=asked | {"rate": 4.0}, base_value=12.0)]

    found = cells(table_of(rows, "S6"))

    assert {
        "nf4 (vllm, rate 1.0)": 100.0, "nf4 (vllm, rate 4.0)": 400.0,
        "fp16 (vllm, rate 1.0)": 50.0, "fp16 (vllm, rate 4.0)": 200.0,
    } == {name: line["Throughput (tok/s)"].value for name, line in found.items()}  # fmt: skip
    assert 9.0 == found["nf4 (vllm, rate 4.0)"]["TTFT, p99 (ms)"].value
    assert {column.metric for column in requested("quantization").columns} <= set(all_metrics())
