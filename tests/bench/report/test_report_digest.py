"""The digest of a run: what comes first, and that it fits a comment."""

import pytest
from report_rows import ACCURACY, LATENCY, LOAD, PERPLEXITY, SIZE, contents_of, row

from bench.errors import JournalError
from bench.report.orders import BEGINNINGS, ORDERS
from bench.report.pull_request import LIMIT, digest


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


def test_rows_that_could_not_be_compared_are_counted_by_their_reason():
    contents = contents_of([row(SIZE, 1.0)], [("not_comparable", 3)] * 12)
    for at, each in enumerate(each for each in contents.records if each["kind"] == "verdict"):
        each["words"] = f"nf4: k{at} not compared: {'recorded elsewhere' if at else 'no gate'}"
    each["words"] = "nf4: k is not available here: no judge"

    text = digest(contents)

    assert "**Not compared**\n\n- 10 rows: recorded elsewhere\n- 1 row: no gate\n- 1 row: no judge\n" in text
    assert "12 not comparable" in text and "**Moved**" not in text


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
    with pytest.raises(JournalError, match="has no results of run r9"):
        digest(contents_of([row(SIZE, 1.0)]), "r9")
