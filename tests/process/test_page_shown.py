"""What the page of the report shows in a browser, against the rows that it is of."""

import base64

import pytest
from chromium import settled, show
from page_rows import RUNS, made

from bench.report.cells import number
from bench.report.overview import QUALITY, Overview
from bench.report.tables import by_device, newest, tables


class TestShown:
    @pytest.fixture
    def opened(self, browser, page_path):
        show(browser, page_path)
        return browser

    def test_the_overview_shows_the_newest_values(self, opened, page_results):
        groups = by_device(newest(page_results[0]))
        shown = opened.execute_script(
            "return [...document.querySelectorAll('#overview .subject')].map((s) => [...s.querySelectorAll('tbody tr')]"
            ".map((row) => [...row.cells].map((cell) => cell.textContent.trim())))"
        )

        assert len(groups) == len(shown)
        for rows, lines in zip(groups.values(), shown, strict=True):
            table = Overview(rows)
            for recipe, *cells, _verdicts in lines:
                for column, cell in zip(table.rows, cells, strict=True):
                    value = table.values(column).get(recipe)
                    assert (number(value) if value is not None else cell) == cell
                    assert value is not None or cell in ("not measured", "failed")
        assert {row.value for row in groups["reference", made.DEVICE] if row.metric == QUALITY[0].metric} == set(
            Overview(groups["reference", made.DEVICE]).values(QUALITY[0]).values()
        )

    def test_cards_show_every_row_and_every_layer(self, opened, page_results):
        opened.execute_script("document.querySelectorAll('.card').forEach((each) => each.open = true)")
        settled(opened, "[...document.querySelectorAll('.card .inside')].every((each) => each.childElementCount)")
        settled(opened, "document.querySelector('.card .barred')")

        shown = opened.execute_script(
            "return [...document.querySelectorAll('.card tr[data-metric]')].map((row) =>"
            " [row.closest('.card').dataset.recipe, row.dataset.metric, row.cells[1].textContent])"
        )
        wanted = [
            [row.recipe, row.metric, row.status if row.value is None else number(row.value)]
            for row in newest(page_results[0])
        ]
        assert sorted(wanted) == sorted(shown)
        bars = opened.execute_script("return document.querySelectorAll('.card .barred').length")
        assert bars == sum(len(each["layers"]) for each in page_results[1].records if each["kind"] == "layers")

    def test_the_history_of_a_metric_is_that_of_the_journal(self, opened, page_results):
        opened.execute_script("document.getElementById('history').scrollIntoView()")
        settled(opened, "document.querySelectorAll('#history-charts figure').length")
        opened.execute_script("document.querySelectorAll('#history-charts details').forEach((it) => it.open = true)")
        settled(opened, "document.querySelectorAll('#history-charts tbody tr').length")

        key = opened.execute_script("return document.getElementById('history-key').value")
        shown = opened.execute_script(
            "return [...document.querySelectorAll('#history-charts figure')].map((each) => [each.dataset.series,"
            " [...each.querySelectorAll('tbody td')].map((cell) => cell.textContent)])"
        )
        wanted: dict[str, list[str]] = {}
        for row in page_results[0]:
            if (row.base, row.device, row.key) == ("reference", made.DEVICE, key):
                wanted.setdefault(row.recipe, []).append(f"{row.value:.6g}")
        assert {RUNS} == {len(values) for values in wanted.values()}
        assert wanted == dict(shown)

    def test_the_papers_tables_are_those_of_the_results(self, opened, page_results):
        wanted = [
            [[cell.text for cell in line.cells] for line in table.lines]
            for rows in by_device(newest(page_results[0])).values()
            for table in tables(rows)
        ]

        shown = opened.execute_script(
            "return [...document.querySelectorAll('.paper')].map((paper) =>"
            " [...paper.querySelector('table').tBodies[0].rows].map((row) =>"
            " [...row.querySelectorAll('td')].map((cell) =>"
            " (cell.querySelector('sup')?.remove(), cell.textContent.trim()))))"
        )
        assert wanted == shown

    def test_a_printed_page_has_no_controls_and_stays_within_the_paper(self, browser, page_path):
        show(browser, page_path, width=720, media="print")

        hidden = "return [...document.querySelectorAll('nav, form, .skip')].map((each) => each.checkVisibility())"
        assert {False} == set(browser.execute_script(hidden))
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"]).startswith(b"%PDF")
