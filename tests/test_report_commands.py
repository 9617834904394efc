"""Commands that the report prints for what is not there run as they are printed."""

import re
import shlex

import pytest
from commands import pytest_bench
from hypothesis import given
from hypothesis import strategies as st
from report_rows import BASELINES, SIZE, contents_of, row

from bench.report import formats
from bench.report.commands import measuring, settings_of
from bench.report.page import page
from bench.report.sources import recorded
from bench.report.tables import tables
from bench.report.write import write

pytest_plugins = ["pytester"]


def printed(text):
    """The commands in a report's Markdown."""
    return list(dict.fromkeys(re.findall(r"`+ ?(pytest bench .*?) ?`+(?= measures|\.)", text)))


@pytest.fixture(scope="module")
def of_the_reference():
    return [command for table in tables(recorded(BASELINES)) for command in printed(formats.markdown(table))]


def test_every_command_in_the_tables_of_the_reference_selects_tests_of_all_its_recipes(of_the_reference, pytester):
    found = list(dict.fromkeys(of_the_reference))
    assert len(found) > 10
    for command in found:
        words = shlex.split(command)
        assert ["pytest", "bench"] == words[:2]

        result = pytest_bench(pytester, "--pyargs", *words[1:], "--collect-only", "-q")

        assert result.ret == 0, command
        for recipe in words[words.index("--model") + 1].split(","):
            assert f"[{recipe.partition('(')[0]}" in result.stdout.str(), command


def test_what_another_base_lacks_is_measured_with_the_settings_of_its_last_run(tmp_path):
    command = ("pytest bench -m quality --base '../my models/hf' --calibration ./texts --data ./texts --length=64 "
               "--model nf4 -n 2 --gate off --report out --allow-code-execution")  # fmt: skip
    contents = contents_of([row(SIZE, 1.0, base="hf"), row(SIZE, 2.0, "gptq", base="hf")])
    contents.records[0]["context"] |= {"base": "hf", "fingerprint": "cpu-test", "command": command}
    wanted = "--base '../my models/hf' --calibration ./texts --data ./texts --length=64 --allow-code-execution"

    write(tmp_path, contents.rows(), contents)

    found = printed((tmp_path / "tables.md").read_text())
    assert f"pytest bench -m efficiency --model fp16,nf4,gptq {wanted}" in found
    assert all(each.endswith(wanted) for each in found)
    assert "../my models/hf" in page(contents.rows(), contents)


def test_without_a_record_of_a_run_the_base_is_called_by_its_name():
    assert "pytest bench -m rag --model nf4 --base random:tiny" == measuring(["rag"], ["nf4"], "random:tiny")
    assert () == settings_of({}) == settings_of({"command": "pytest bench --base 'cut off"})


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12))
def test_whatever_the_base_is_called_the_command_is_one_line_that_names_it(name):
    command = measuring(["efficiency"], ["nf4"], "hf", ("--base", name))

    assert command.isprintable() or "\n" not in command
    assert "`" not in command
    assert ("--base", name) == settings_of({"command": command})
