"""The page of the report by keys alone: skipped to, sorted, filtered, opened."""

import re
from collections import Counter

import pytest
from chromium import WIDTHS, settled, show
from page_rows import OTHER

from bench.report.cells import number
from bench.report.tables import by_device, newest


class TestKeys:
    @pytest.fixture(params=WIDTHS.values(), ids=WIDTHS)
    def keys(self, browser, page_path, request):
        """Presses keys in what has the focus."""
        from selenium.webdriver.common.keys import Keys

        show(browser, page_path, width=request.param)

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

    def rows_in(self, card, page_results):
        """Of the recipe of a card, the name of each row and its value, or why there is none."""
        rows = list(by_device(newest(page_results[0])).values())[int(card.get_attribute("data-subject"))]
        return [
            f"{row.metric.split('.')[1].replace('_', ' ')} {row.status if row.value is None else number(row.value)}"
            for row in rows
            if row.recipe == card.get_attribute("data-recipe")
        ]

    def test_a_card_is_opened_by_a_key(self, browser, keys, page_results):
        card = browser.find_element("css selector", ".card")
        inside, wanted = card.find_element("css selector", ".inside"), self.rows_in(card, page_results)
        assert wanted
        assert "" == inside.text

        browser.execute_script("arguments[0].querySelector('summary').focus()", card)
        keys("ENTER")
        settled(browser, "document.querySelector('.card .inside').childElementCount")
        assert [] == [row for row in wanted if row not in inside.text]
        keys("ENTER")
        assert "" == inside.text

    def test_a_link_to_a_card_opens_it(self, browser, keys, page_results):
        link = browser.find_elements("css selector", ".overview tbody a")[-1]
        card = browser.find_element("id", link.get_attribute("href").partition("#")[2])
        inside, wanted = card.find_element("css selector", ".inside"), self.rows_in(card, page_results)
        assert wanted
        assert "" == inside.text

        browser.execute_script("arguments[0].focus()", link)
        keys("ENTER")
        settled(browser, "document.querySelector('.card[open] .inside')?.childElementCount")
        top = "document.querySelector('.card[open]').getBoundingClientRect().top"
        settled(browser, f"{top} > -1 && {top} < innerHeight")
        assert [] == [row for row in wanted if row not in inside.text]
        others = browser.find_elements("css selector", f".card:not([id='{card.get_attribute('id')}']) .inside")
        assert {""} == {each.text for each in others}
