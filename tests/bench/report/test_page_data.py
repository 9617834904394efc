"""What the page of the report holds: rows, verdicts, layers and history, and nothing from a network."""

import json
import re
import sys
from collections import Counter

import pytest
from healthy_results import healthy_row
from hypothesis import given
from hypothesis import strategies as st
from page_rows import RUNS, held, unpacked
from processes import completed

from bench.report import trend
from bench.report.page import page
from bench.report.tables import newest
from bench.results.records import Contents


class TestData:
    def test_every_value_is_in_the_page_as_the_journal_has_it(self, page_results, page_text):
        wanted = Counter((row.base, row.device, row.recipe, row.metric, row.value) for row in newest(page_results[0]))

        found = Counter(
            (subject["base"], subject["device"], recipe, row["metric"], row.get("value"))
            for subject in held(page_text, "data")["subjects"]
            for recipe, rows in subject["recipes"].items()
            for row in rows
        )
        assert wanted == found

    def test_the_history_is_that_of_the_journal_to_six_digits(self, page_results, page_text):
        history = held(page_text, "past")["journal"]
        places = {each["run"]: place for place, each in enumerate(history["runs"])}

        for row in page_results[0]:
            if row.value is not None:
                values = unpacked(history["values"][row.base][row.device][row.recipe][row.key])
                assert float(f"{row.value:.6g}") == values[places[row.run]]
        assert RUNS + 2 == len(places)

    def test_layers_are_those_of_the_journal(self, page_results, page_text):
        found = held(page_text, "layers")[0]

        wanted = [each["layers"] for each in page_results[1].records if each["kind"] == "layers"]
        assert sorted(wanted, key=str) == sorted((each["layers"] for each in found), key=str)

    def test_it_needs_no_network(self, page_text):
        without_data = re.sub(r"<script type=.*?</script>", "", page_text, flags=re.DOTALL)

        assert "default-src 'none'" in page_text
        assert set(re.findall(r"""(?:src|href)=["']?([^#"'>\s][^"'>\s]*)""", without_data)) == {"data:,"}
        assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|import\(", without_data)

    def test_what_fails_stands_at_the_top_with_its_words(self, page_results, page_text):
        failing = [each for each in page_results[1].records if each.get("outcome") in ("regressed", "missing")]

        assert failing
        for each in failing:
            assert f"<li>{each['words'].replace('>', '&gt;')}</li>" in page_text

    def test_there_is_no_page_of_nothing(self, page_results):
        with pytest.raises(ValueError, match="there are no results to show"):
            page([], page_results[1])

    def test_a_few_rows_without_runs_verdicts_or_layers_make_a_page(self):
        rows = [healthy_row("efficiency.stored_bytes", value=1.0)]

        text = page(rows, Contents(records=[], torn=[], writing=frozenset()))
        assert "No recipe has both a quality and a cost yet" in text
        assert [1.0] == [row["value"] for row in held(text, "data")["subjects"][0]["recipes"]["nf4"]]


class TestHistory:
    @given(st.dictionaries(st.integers(0, 30), st.sampled_from([0.5, 0.25, 1e-9, 123456.5, -2.0]), min_size=1))
    def test_packing_loses_no_run(self, series):
        values = unpacked(trend.packed(series))

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
        completed(command, cwd=tmp_path, check=True, text=False)
        (file,) = (tmp_path / ".benchmarks").glob("*/*.json")
        stored = {each["name"]: each["stats"]["median"] for each in json.loads(file.read_text())["benchmarks"]}

        runs, values = trend.stored(tmp_path / ".benchmarks")
        assert [file.stem] == [each["run"] for each in runs]
        (device,) = values["reference"]
        key = "pytest_benchmark.round_s[batch_size=2]"
        assert {"reference": {device: {"nf4": {key: f"{stored['test_it']:.6g}"}}}} == values

    def test_a_file_that_is_not_pytest_benchmarks_is_refused_by_name(self, tmp_path):
        (tmp_path / "machine").mkdir()
        (tmp_path / "machine" / "0001.json").write_text("{}")
        with pytest.raises(trend.JournalError, match=r"0001\.json is no storage of pytest-benchmark"):
            trend.stored(tmp_path)

    def test_no_storage_has_no_runs(self, tmp_path):
        assert ([], {}) == trend.stored(tmp_path / "nowhere")
