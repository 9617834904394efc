"""The table that a run prints at its end: in groups, no wider than the terminal, and nothing is lost."""

import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from report_rows import ACCURACY, LATENCY, LOAD, PERPLEXITY, SIZE, row

from bench.report import formats
from bench.report.columns import WIDTH, blocks, wrapped
from bench.report.tables import tables
from bench.report.terminal_table import terminal_table
from bench.results.item_pairs import compare
from bench.results.items import Items, hashes_of

names = st.text("ab(),=-_0", min_size=1, max_size=150)
shapes = st.integers(1, 12).flatmap(
    lambda columns: st.tuples(
        st.lists(names, min_size=columns, max_size=columns),
        st.lists(st.tuples(names, st.lists(names, min_size=columns, max_size=columns)), min_size=1, max_size=4),
    )
)


@given(shapes, st.integers(30, 150))
def test_no_line_of_a_table_is_wider_than_the_terminal_and_nothing_is_lost(shape, width):
    heads, rows = shape

    found = blocks(heads, rows, width=width)

    assert max(map(len, found)) <= width
    letters = "".join(found).replace(" ", "")
    assert all(letters.count(sign) >= "".join([*heads, *(cell for _, cells in rows for cell in cells)]).count(sign)
               for sign in "ab0")  # fmt: skip


@given(st.text(max_size=200), st.integers(1, 50))
def test_a_wrapped_text_fits_and_has_every_word(text, width):
    found = wrapped(text, width)

    assert max(map(len, found)) <= width
    assert "".join(text.split()) == "".join("".join(found).split())


LONG = [f"gptq(bits={bits},group_size={size},act_order=true,static_groups=true,damp=0.05)" for bits in (2, 3, 4, 8)
        for size in (32, 64, 128)]  # fmt: skip


def many_rows():
    """Twelve long recipes with sizes, times and results per item."""
    then = Items(hashes_of(range(40)), [0.5] * 40, "real")
    for at, recipe in enumerate(["fp16", *LONG]):
        base = None if recipe == "fp16" else 4.0
        yield row(SIZE, 1.0 + at, recipe, base_value=base)
        yield row(LATENCY, 3.0 + at, recipe, base_value=base and base + at, params=LOAD)
        now = Items(then.hashes, [0.5 + at / 100] * 40, "real")
        paired = compare(now, then).to_json() if base else None
        for metric in (PERPLEXITY, ACCURACY):
            yield row(metric, 2.0 + at, recipe, base_value=base, items=now, paired=paired)


def test_the_table_of_many_long_recipes_fits_120_columns_with_the_verdict_last():
    rows = list(many_rows())

    shown = terminal_table(rows, {(each.recipe, each.key): "regressed" for each in rows})

    assert max(map(len, shown)) <= WIDTH == 120
    values = [line for line in shown if re.search(r"\d  .*REGRESSED", line)]
    assert values and all(line.endswith("REGRESSED") for line in values)
    assert max(len(line) for table in tables(rows) for line in formats.text(table).splitlines()) <= WIDTH


def test_recipes_that_fit_beside_each_other_are_columns_and_more_are_lines():
    def shown(count):
        return terminal_table([row(SIZE, 1.0 + at, f"rtn(bits={at})") for at in range(count)], {}, 80)

    assert ["rtn(bits=0)", "rtn(bits=1)", "rtn(bits=2)"] == shown(3)[0].split()
    assert [f"rtn(bits={at})" for at in range(9)] == [line.split()[0] for line in shown(9)[2:]]


def test_times_in_the_terminal_are_ratios_laid_on_one_value_of_the_base():
    rows = list(many_rows())[:8]  # fp16 and one recipe
    slower = replace(rows[5], value=50.0, base_value=100.0, ratio=0.5)

    shown = "\n".join(terminal_table([*rows[:4], slower], {}))

    assert "  1.5  0.500x" in shown
    assert "50" not in shown.replace("0.500x", "")


def test_what_recipes_were_calibrated_on_is_said_below_the_table_and_does_not_part_them():
    rows = [row(SIZE, 4.0, "fp16"), row(SIZE, 1.0, "nf4", base_value=4.0)]
    rows += [
        replace(row(SIZE, 2.0, recipe, base_value=4.0), params={"calibration": "0a1b"}) for recipe in ("awq", "gptq")
    ]

    shown = terminal_table(rows, {})

    assert ["fp16", "nf4", "awq", "gptq"] == shown[0].split()
    assert 1 == sum("model_size_gb" in line for line in shown)
    assert "calibration=0a1b: awq, gptq" == shown[-1]


def test_a_recipe_of_two_calibration_texts_has_a_line_for_each():
    rows = [replace(row(SIZE, 1.0 + at, "gptq"), params={"calibration": text}) for at, text in enumerate("ab")]

    shown = terminal_table(rows, {})

    assert [f"model_size_gb (GiB) calibration={text}" for text in "ab"] == [line[2:35] for line in shown[2:4]]


def test_conditions_in_common_are_in_the_heading_and_the_fewest_others_beside_the_lines():
    conditions = {"items": 500, "shots": 0, "score": "acc"}
    rows = [
        row("quality.accuracy", 0.5, "nf4", params=conditions | {"task": task, "data": f"{task}@1"})
        for task in ("mmlu", "piqa")
    ]

    shown = terminal_table(rows, {})

    assert "TASKS, items=500, score=acc, shots=0" == shown[1]
    assert ["  accuracy (share) task=mmlu  0.5", "  accuracy (share) task=piqa  0.5"] == shown[2:]
    assert "task=mmlu, data=mmlu@1" in "".join(terminal_table(rows, {}, verbose=True))


measured = st.dictionaries(
    st.tuples(st.sampled_from(["fp16", "nf4", "awq"]), st.sampled_from("abc")), st.booleans(), min_size=1
).map(lambda cells: {(recipe, text): beside and recipe != "fp16" for (recipe, text), beside in cells.items()})


@given(measured)
def test_whatever_was_measured_under_whatever_conditions_has_its_cell(cells):
    rows = [
        row(
            SIZE,
            1.0 + at,
            recipe,
            params={"calibration": text},
            base_value=4.0 if beside and recipe != "fp16" else None,
        )
        for at, ((recipe, text), beside) in enumerate(cells.items())
    ]

    shown = "\n".join(terminal_table(rows, {}))

    assert all(f"calibration={text}" in shown and recipe in shown for recipe, text in cells)
    assert all(f" {1 + at}" in shown for at in range(len(rows)))
