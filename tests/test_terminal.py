"""What a run prints at its end: tables of at most 120 columns, and in one line what was not compared."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_rows import ACCURACY, LATENCY, LOAD, PERPLEXITY, SIZE, row

from bench.gate.verdicts import Verdict
from bench.report import formats
from bench.report.columns import WIDTH, blocks, wrapped
from bench.report.tables import tables
from bench.results.item_pairs import compare
from bench.results.items import Items, hashes_of
from bench.session.summary import lines, terminal_table

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
    assert len([line for line in shown if line.startswith(SIZE)]) > 1  # in blocks
    assert all(line.endswith("REGRESSED") for line in shown if line.startswith((SIZE, LATENCY)))
    assert max(len(line) for table in tables(rows) for line in formats.text(table).splitlines()) <= WIDTH


def test_times_in_the_terminal_are_ratios_laid_on_one_value_of_the_base():
    rows = list(many_rows())[:8]  # fp16 and one recipe
    slower = replace(rows[5], value=50.0, base_value=100.0, ratio=0.5)

    shown = "\n".join(terminal_table([*rows[:4], slower], {}))

    assert "  1.5  0.500x" in shown
    assert "50" not in shown.replace("0.500x", "")


@pytest.mark.parametrize("verbose", [False, True])
def test_what_was_not_compared_is_one_line_with_a_count_and_a_list_with_v(verbose):
    rows = {(each.recipe, each.key): each for each in many_rows()}
    verdicts = {
        place: Verdict(recipe=place[0], key=place[1], outcome="not_comparable", fails=False,
                       words=f"{place[0]}: {place[1]} not compared: another device")
        for place in rows
    }  # fmt: skip
    options = SimpleNamespace(gate="auto", update=False, command="pytest bench", baselines="baselines",
                              record_command="pytest bench --update-baselines")  # fmt: skip
    run = SimpleNamespace(rows=rows, verdicts=verdicts, kernels={}, notes={}, steps={}, baselines={}, changes=[],
                          fingerprint="cpu", source=SimpleNamespace(label="reference"), options=options,
                          journal=SimpleNamespace(path="journal.jsonl"))  # fmt: skip

    said = [line for line in lines(run, verbose=verbose) if "not compared" in line or "nothing to compare" in line]

    assert said[0].startswith(f"nothing to compare with for {len(rows)} rows")
    assert len(said) == (1 + len(rows) if verbose else 1)
    assert ("-v" in said[0]) == (not verbose)


def test_recipes_that_read_another_text_stand_in_a_block_of_their_own_without_empty_lines():
    rows = [row(SIZE, 4.0, "fp16"), row(SIZE, 1.0, "nf4", base_value=4.0)]
    rows += [
        replace(row(SIZE, 2.0, recipe, base_value=4.0), params={"calibration": "0a1b"}) for recipe in ("awq", "gptq")
    ]

    shown = terminal_table(rows, {})

    assert "not measured" not in "\n".join(shown)
    heads = [line.split() for line in shown if line.split() and set(line.split()) <= {"fp16", "nf4", "awq", "gptq"}]
    assert [["fp16", "nf4"], ["fp16", "awq", "gptq"]] == heads


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
