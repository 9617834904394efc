"""The page of the report in a browser: both themes, a desktop and a phone, names read aloud, no script."""

import itertools
import re
from collections import Counter

import pytest
from chromium import WIDTHS, settled, show

from bench.report.orders import ORDERS


@pytest.fixture(scope="module", params=list(itertools.product(WIDTHS, ("light", "dark"))), ids="-".join)
def width(browser, page_path, request):
    """The width at which the page is shown with all that can be opened open, in either theme."""
    width, scheme = WIDTHS[request.param[0]], request.param[1]
    browser.get_log("browser")  # what others left
    show(browser, page_path, width=width, scheme=scheme)
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


def test_every_part_has_a_name_that_is_read_aloud(browser, page_path):
    show(browser, page_path)
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


def test_a_page_without_its_script_still_has_overview_fronts_and_tables(browser, page_path, tmp_path):
    bare = re.sub(r"<script>.*?</script>", "", page_path.read_text(), flags=re.DOTALL)
    (tmp_path / "bare.html").write_text(bare)
    show(browser, tmp_path / "bare.html")

    visible = "return [...document.querySelectorAll(arguments[0])].filter((each) => each.checkVisibility()).length"
    assert browser.execute_script(visible, "#fronts figure svg") > 4  # all measures of quality
    assert browser.execute_script(visible, ".overview tbody tr") == len(browser.find_elements("css selector", ".card"))
    assert browser.execute_script(visible, "form") == 0
