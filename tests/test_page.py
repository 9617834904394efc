"""The page of the report, in a browser: what it shows against the rows that it is of, keys alone, both themes, a phone.

The rows are those of benchmarks/report_page.py and of the orders, with one that failed and one of a base whose name
would be markup.
"""

import base64
import gzip
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import WIDTHS, chromium, settled, show
from healthy_results import healthy_row
from hypothesis import given
from hypothesis import strategies as st
from test_orderings import LOSSES, rows_of

from bench.journal import Contents
from bench.orderings import ORDERS
from bench.report import charts, past
from bench.report._cells import number
from bench.report.fronts import front
from bench.report.overview import QUALITY, Overview
from bench.report.page import page
from bench.report.tables import by_device, newest, tables

_SPEC = importlib.util.spec_from_file_location(
    "report_page", Path(__file__).parents[1] / "benchmarks" / "report_page.py"
)
made = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made)

OTHER, REASON = "my<b>base</b>&co", "</script><script>document.title = 'broken out'</script>"
RUNS = 5


@pytest.fixture(scope="module")
def results():
    """Rows of several runs, two bases and two devices, and the journal that they are of."""
    journal = made.contents(made.recipes(9), made.metrics(16), RUNS, blocks=2)
    ordered = [replace(row, run="run-orders") for row in rows_of(LOSSES)]
    odd = [
        healthy_row("efficiency.stored_bytes", run="run-odd", base=OTHER, recipe="nf4", value=3e6, base_value=1e7),
        healthy_row("quality.perplexity", run="run-odd", base=OTHER, recipe="nf4", value=None, status="failed",
                    reason=REASON),
    ]  # fmt: skip
    later = [{"kind": "row", "time": 1.9e9, **row.to_json()} for row in (*ordered, *odd)]
    gone = {"kind": "verdict", "run": "run-odd", "time": 1.9e9, "recipe": "nf4", "outcome": "missing",
            "key": "efficiency.decode_ms", "words": "nf4: efficiency.decode_ms is missing"}  # fmt: skip
    contents = Contents(records=[*journal.records, *later, gone], torn=[], writing=frozenset())
    return contents.rows(), contents


@pytest.fixture(scope="module")
def text(results):
    return page(*results)


@pytest.fixture(scope="module")
def path(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def held(text, name):
    """What the page holds in one of its elements of data."""
    found = re.search(rf'<script type="application/json(\+gzip)?" id="{name}">(.*?)</script>', text, re.DOTALL)
    return json.loads(gzip.decompress(base64.b64decode(found[2])) if found[1] else found[2])


def unpacked(words):
    """The slow reader of `past.packed`."""
    values = []
    for word in words.split():
        if word.startswith("_"):
            values += [None] * int(word[1:])
        elif word.startswith("="):
            values += [values[-1]] * int(word[1:])
        else:
            values.append(float(word))
    return values


class TestData:
    def test_every_value_is_in_the_page_as_the_journal_has_it(self, results, text):
        wanted = Counter((row.base, row.device, row.recipe, row.metric, row.value) for row in newest(results[0]))

        found = Counter(
            (subject["base"], subject["device"], recipe, row["metric"], row.get("value"))
            for subject in held(text, "data")["subjects"]
            for recipe, rows in subject["recipes"].items()
            for row in rows
        )
        assert wanted == found

    def test_the_history_is_that_of_the_journal_to_six_digits(self, results, text):
        history = held(text, "past")["journal"]
        places = {each["run"]: place for place, each in enumerate(history["runs"])}

        for row in results[0]:
            if row.value is not None:
                values = unpacked(history["values"][row.base][row.device][row.recipe][row.key])
                assert float(f"{row.value:.6g}") == values[places[row.run]]
        assert RUNS + 2 == len(places)

    def test_layers_are_those_of_the_journal(self, results, text):
        found = held(text, "layers")[0]

        wanted = [each["layers"] for each in results[1].records if each["kind"] == "layers"]
        assert sorted(wanted, key=str) == sorted((each["layers"] for each in found), key=str)

    def test_it_needs_no_network(self, text):
        without_data = re.sub(r"<script type=.*?</script>", "", text, flags=re.DOTALL)

        assert "default-src 'none'" in text
        assert set(re.findall(r"""(?:src|href)=["']?([^#"'>\s][^"'>\s]*)""", without_data)) == {"data:,"}
        assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|import\(", without_data)

    def test_what_fails_stands_at_the_top_with_its_words(self, results, text):
        failing = [each for each in results[1].records if each.get("outcome") in ("regressed", "missing")]

        assert failing
        for each in failing:
            assert f"<li>{each['words'].replace('>', '&gt;')}</li>" in text

    def test_there_is_no_page_of_nothing(self, results):
        with pytest.raises(ValueError, match="a page of no results"):
            page([], results[1])

    def test_a_few_rows_without_runs_verdicts_or_layers_make_a_page(self):
        rows = [healthy_row("efficiency.stored_bytes", value=1.0)]

        text = page(rows, Contents(records=[], torn=[], writing=frozenset()))
        assert "No recipe has both a quality and a cost yet" in text
        assert [1.0] == [row["value"] for row in held(text, "data")["subjects"][0]["recipes"]["nf4"]]


class TestHistory:
    @given(st.dictionaries(st.integers(0, 30), st.sampled_from([0.5, 0.25, 1e-9, 123456.5, -2.0]), min_size=1))
    def test_packing_loses_no_run(self, series):
        values = unpacked(past.packed(series))

        assert [series.get(place) for place in range(max(series) + 1)] == [
            value if value is None or value != 123456 else 123456.5 for value in values
        ]

    def test_what_pytest_benchmark_stored_is_read(self, tmp_path):
        (tmp_path / "test_made.py").write_text(
            "def test_it(benchmark):\n"
            "    benchmark.extra_info.update(recipe='nf4', base='reference', batch_size=2)\n"
            "    benchmark.pedantic(lambda: None, rounds=3)\n"
            "def test_of_somebody_else(benchmark):\n"
            "    benchmark(lambda: None)\n"
        )
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark-autosave", str(tmp_path)]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=100)
        (file,) = (tmp_path / ".benchmarks").glob("*/*.json")
        stored = {each["name"]: each["stats"]["median"] for each in json.loads(file.read_text())["benchmarks"]}

        runs, values = past.stored(tmp_path / ".benchmarks")
        assert [file.stem] == [each["run"] for each in runs]
        (device,) = values["reference"]
        key = "pytest_benchmark.round_s[batch_size=2]"
        assert {"reference": {device: {"nf4": {key: f"{stored['test_it']:.6g}"}}}} == values

    def test_a_file_that_is_not_pytest_benchmarks_is_refused_by_name(self, tmp_path):
        (tmp_path / "machine").mkdir()
        (tmp_path / "machine" / "0001.json").write_text("{}")
        with pytest.raises(past.JournalError, match=r"0001\.json is no storage of pytest-benchmark"):
            past.stored(tmp_path)

    def test_no_storage_has_no_runs(self, tmp_path):
        assert ([], {}) == past.stored(tmp_path / "nowhere")


class TestCharts:
    numbers = st.floats(1e-6, 1e6)
    points = st.dictionaries(st.text("abc<&\"'", min_size=1, max_size=4), st.tuples(numbers, numbers), min_size=1)

    @given(points)
    def test_every_point_is_drawn_once_and_only_the_front_is_coloured(self, points):
        by = front(points)

        drawn = charts.front(
            [charts.Point(name=name, family="f", x=x, y=y, by=by[name]) for name, (x, y) in points.items()],
            x="cost", y="quality", higher=False, title="t",
        )  # fmt: skip
        assert len(points) == drawn.count("<circle")
        assert sum(each is None for each in by.values()) == drawn.count('<g class="best"')
        places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', drawn)]
        assert all(0 <= x <= charts.WIDTH and 0 <= y <= 250 for x, y in places)
        assert not re.search(r"<(?!/?(svg|g|line|text|circle|polyline|title)\b)", drawn)  # names are text, never markup

    @given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
    def test_an_axis_has_two_to_eight_round_lines_within_its_ends(self, low, width):
        high = low + width
        if high - low > 1e-6 * max(abs(low), abs(high)):
            ticks = charts._ticks(low, high)
            assert 2 <= len(ticks) <= 8
            assert all(low - 1e-6 * width <= each <= high + 1e-6 * width for each in ticks)


@pytest.fixture(scope="module", params=list(itertools.product(WIDTHS, ("light", "dark"))), ids="-".join)
def width(browser, path, request):
    """The width at which the page is shown with all that can be opened open, in either theme."""
    width, scheme = WIDTHS[request.param[0]], request.param[1]
    browser.get_log("browser")  # what others left
    show(browser, path, width=width, scheme=scheme)
    browser.execute_script("document.getElementById('history').scrollIntoView()")
    settled(browser, "document.querySelectorAll('#history-charts figure').length")
    browser.execute_script("document.querySelectorAll('details').forEach((each) => each.open = true)")
    settled(browser, "[...document.querySelectorAll('.card .inside')].every((each) => each.childElementCount)")
    return width


class TestLook:
    def test_nothing_overflows_nothing_is_logged_and_all_charts_are_there(self, browser, width):
        wide, inner = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        beyond = browser.execute_script(
            "return [...document.querySelectorAll('body *:not(.scroll *, svg *)')].filter((each) =>"
            " each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML.slice(0, 200))"
        )
        assert [] == beyond
        assert wide == inner <= width
        assert [] == browser.get_log("browser")
        assert browser.title.startswith("Compression of reference")
        drawn = browser.execute_script(
            "return [...document.querySelectorAll('figure svg')].filter((each) => each.checkVisibility())"
            ".map((each) => [each.closest('section').id, each.getAttribute('role'), each.getAttribute('aria-label'),"
            " each.getBoundingClientRect().width, each.getBoundingClientRect().height])"
        )
        assert {"fronts", "orders", "rag", "history"} == {section for section, *_ in drawn}
        assert 5 == sum(section == "fronts" for section, *_ in drawn)  # of the orders only size is known beside quality
        assert len(ORDERS) + 1 == sum(section == "orders" for section, *_ in drawn)  # and the scale
        for _, role, label, wide, high in drawn:
            assert ("img", True) == (role, bool(label))
            assert 100 < wide <= width
            assert high > 10

    def test_text_stands_out_from_what_is_behind_it(self, browser, width):
        found = browser.execute_script(_CONTRASTS)
        assert len(found) > 10  # kinds of text
        assert {each: ratio for each, ratio in found.items() if ratio < 4.5} == {}


_CONTRASTS = """
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const colour = parts(getComputedStyle(each).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
};
const found = {};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
  if (["SCRIPT", "STYLE", "NOSCRIPT", "title"].includes(element.tagName)) continue;
  const style = getComputedStyle(element), svg = element.closest("svg");
  const [a, b] = [light(parts(svg ? style.fill : style.color)), light(behind(svg ? svg.parentElement : element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const name = `${element.tagName} ${element.getAttribute("class") ?? ""}`;
  found[name] = Math.min(found[name] ?? 99, ratio);
}
return found;
"""


class TestShown:
    @pytest.fixture
    def opened(self, browser, path):
        show(browser, path)
        return browser

    def test_the_overview_shows_the_newest_values(self, opened, results):
        groups = by_device(newest(results[0]))
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

    def test_cards_show_every_row_and_every_layer(self, opened, results):
        opened.execute_script("document.querySelectorAll('.card').forEach((each) => each.open = true)")
        settled(opened, "[...document.querySelectorAll('.card .inside')].every((each) => each.childElementCount)")
        settled(opened, "document.querySelector('.card .barred')")

        shown = opened.execute_script(
            "return [...document.querySelectorAll('.card tr[data-metric]')].map((row) =>"
            " [row.closest('.card').dataset.recipe, row.dataset.metric, row.cells[1].textContent])"
        )
        wanted = [
            [row.recipe, row.metric, row.status if row.value is None else number(row.value)]
            for row in newest(results[0])
        ]
        assert sorted(wanted) == sorted(shown)
        bars = opened.execute_script("return document.querySelectorAll('.card .barred').length")
        assert bars == sum(len(each["layers"]) for each in results[1].records if each["kind"] == "layers")

    def test_the_history_of_a_metric_is_that_of_the_journal(self, opened, results):
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
        for row in results[0]:
            if (row.base, row.device, row.key) == ("reference", made.DEVICE, key):
                wanted.setdefault(row.recipe, []).append(f"{row.value:.6g}")
        assert {RUNS} == {len(values) for values in wanted.values()}
        assert wanted == dict(shown)

    def test_the_papers_tables_are_those_of_the_results(self, opened, results):
        wanted = [
            [[cell.text for cell in line.cells] for line in table.lines]
            for rows in by_device(newest(results[0])).values()
            for table in tables(rows)
        ]

        shown = opened.execute_script(
            "return [...document.querySelectorAll('.paper')].map((paper) =>"
            " [...paper.querySelector('table').tBodies[0].rows].map((row) =>"
            " [...row.querySelectorAll('td')].map((cell) =>"
            " (cell.querySelector('sup')?.remove(), cell.textContent.trim()))))"
        )
        assert wanted == shown

    def test_a_printed_page_has_no_controls_and_stays_within_the_paper(self, browser, path):
        show(browser, path, width=720, media="print")

        hidden = "return [...document.querySelectorAll('nav, form, .skip')].map((each) => each.checkVisibility())"
        assert {False} == set(browser.execute_script(hidden))
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"]).startswith(b"%PDF")


class TestKeys:
    @pytest.fixture(params=WIDTHS.values(), ids=WIDTHS)
    def keys(self, browser, path, request):
        """Presses keys in what has the focus."""
        from selenium.webdriver.common.keys import Keys

        show(browser, path, width=request.param)

        def press(*names):
            for name in names:
                browser.switch_to.active_element.send_keys(getattr(Keys, name, name))

        return press

    def shown(self, browser):
        return browser.execute_script(
            "return [...document.querySelectorAll('.overview tbody tr')].filter((each) => each.checkVisibility())"
            ".map((each) => each.dataset.recipe)"
        )

    def test_the_first_key_leads_past_the_navigation(self, browser, keys):
        keys("TAB")
        assert "Skip to the results" == browser.switch_to.active_element.text
        assert browser.execute_script("return document.activeElement.getBoundingClientRect().left") >= 0
        keys("ENTER")
        assert "main" == browser.switch_to.active_element.get_attribute("id")

    @pytest.mark.parametrize("name", ["Perplexity", "Size"])
    def test_a_column_is_sorted_and_turned_round(self, browser, keys, name):
        button = next(
            each for each in browser.find_elements("css selector", ".overview th button") if each.text.startswith(name)
        )
        place = browser.execute_script("return arguments[0].closest('th').cellIndex", button)
        column = (
            "return [...document.querySelector('.overview').tBodies[0].rows]"
            f".map((row) => Number.parseFloat(row.cells[{place}].textContent))"
        )
        before = browser.execute_script(column)
        browser.execute_script("arguments[0].focus()", button)
        for direction, turned in (("ascending", False), ("descending", True)):
            keys("ENTER")
            after = browser.execute_script(column)
            assert sorted(before, reverse=turned) == after
            sorts = browser.execute_script(
                "return [...document.querySelector('.overview').tHead.rows[0].cells].map((each) => each.ariaSort)"
            )
            assert Counter({"none": len(sorts) - 1, direction: 1}) == Counter(sorts)
        assert before != after

    def test_a_name_and_a_family_are_filtered_for(self, browser, keys):
        everything = self.shown(browser)
        browser.execute_script("document.getElementById('find').focus()")
        keys(*"NF4")

        assert [each for each in everything if "nf4" in each] == self.shown(browser)
        assert 0 < len(self.shown(browser)) < len(everything)
        assert re.fullmatch(r"\d+ of \d+ recipes", browser.find_element("id", "shown").text)
        keys(*["BACKSPACE"] * 3)
        assert everything == self.shown(browser)
        browser.execute_script("document.getElementById('family').focus()")
        keys(*"Pru")
        chosen = browser.execute_script("return document.getElementById('family').value")
        assert "pruning" == chosen
        assert {"p"} | {each for each in everything if each.startswith("wanda")} == set(self.shown(browser))

    def test_a_base_is_filtered_for(self, browser, keys):
        browser.execute_script("document.getElementById('base').focus()")
        keys(*"my")

        assert {"fp16", "nf4"} == set(self.shown(browser))
        heads = browser.execute_script(
            "return [...document.querySelectorAll('.subject')].filter((each) => each.checkVisibility())"
            ".map((each) => each.dataset.base)"
        )
        assert {OTHER} == set(heads)

    def rows_in(self, card, results):
        """Of the recipe of a card, the name of each row and its value, or why there is none."""
        rows = list(by_device(newest(results[0])).values())[int(card.get_attribute("data-subject"))]
        return [
            f"{row.metric.split('.')[1].replace('_', ' ')} {row.status if row.value is None else number(row.value)}"
            for row in rows
            if row.recipe == card.get_attribute("data-recipe")
        ]

    def test_a_card_is_opened_by_a_key(self, browser, keys, results):
        card = browser.find_element("css selector", ".card")
        inside, wanted = card.find_element("css selector", ".inside"), self.rows_in(card, results)
        assert wanted
        assert "" == inside.text

        browser.execute_script("arguments[0].querySelector('summary').focus()", card)
        keys("ENTER")
        settled(browser, "document.querySelector('.card .inside').childElementCount")
        assert [] == [row for row in wanted if row not in inside.text]
        keys("ENTER")
        assert "" == inside.text

    def test_a_link_to_a_card_opens_it(self, browser, keys, results):
        link = browser.find_elements("css selector", ".overview tbody a")[-1]
        card = browser.find_element("id", link.get_attribute("href").partition("#")[2])
        inside, wanted = card.find_element("css selector", ".inside"), self.rows_in(card, results)
        assert wanted
        assert "" == inside.text

        browser.execute_script("arguments[0].focus()", link)
        keys("ENTER")
        settled(browser, "document.querySelector('.card[open] .inside')?.childElementCount")
        top = "document.querySelector('.card[open]').getBoundingClientRect().top"
        settled(browser, f"{top} > -1 && {top} < innerHeight")  # the page moves there smoothly, to a whole pixel
        assert [] == [row for row in wanted if row not in inside.text]
        others = browser.find_elements("css selector", f".card:not([id='{card.get_attribute('id')}']) .inside")
        assert {""} == {each.text for each in others}


def test_every_part_has_a_name_that_is_read_aloud(browser, path):
    show(browser, path)
    browser.execute_script("document.querySelectorAll('details').forEach((each) => each.open = true)")
    settled(browser, "[...document.querySelectorAll('.card .inside')].every((each) => each.childElementCount)")

    assert "en" == browser.execute_script("return document.documentElement.lang")
    without = {
        "cells of heads without a scope": "th:not([scope])",
        "pictures without a name": "svg:not([role=img][aria-label]):not([aria-hidden])",
        "figures without a caption": "figure:not(:has(> figcaption))",
        "fields outside of a label": ":is(input, select):not(label *)",
        "scrolled parts that no key reaches": ".scroll:not([tabindex='0'][role=region][aria-label])",
        "sections without a heading": "section:not([aria-labelledby])",
    }
    found = {what: len(browser.find_elements("css selector", which)) for what, which in without.items()}
    assert dict.fromkeys(without, 0) == found
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert [] == [name for name, count in Counter(ids).items() if count > 1]
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map((each) => Number(each.tagName[1]))"
    )
    assert 1 == levels[0]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert 1 == len(browser.find_elements("css selector", "main"))


def test_a_page_without_its_script_still_has_overview_fronts_and_tables(browser, path, tmp_path):
    bare = re.sub(r"<script>.*?</script>", "", path.read_text(), flags=re.DOTALL)
    (tmp_path / "bare.html").write_text(bare)
    show(browser, tmp_path / "bare.html")

    visible = "return [...document.querySelectorAll(arguments[0])].filter((each) => each.checkVisibility()).length"
    assert browser.execute_script(visible, "#fronts figure svg") > 4  # all measures of quality
    assert browser.execute_script(visible, ".overview tbody tr") == len(browser.find_elements("css selector", ".card"))
    assert browser.execute_script(visible, "form") == 0
