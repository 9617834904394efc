"""Commands that the report prints for what is not there run as they are printed."""

import re
import shlex

import pytest
from commands import pytest_bench
from hypothesis import given
from hypothesis import strategies as st
from report_rows import BASELINES, SIZE, contents_of, row

from bench.__main__ import main as command
from bench.report import formats
from bench.report.commands_to_type import SHORTENED, measuring, settings_of
from bench.report.page import page
from bench.report.tables import tables
from bench.report.write import chosen_of_baselines, write
from bench.results.journal import Journal
from compression import split_recipes

pytest_plugins = ["pytester"]


def printed(text):
    """The commands in a report's Markdown."""
    return list(dict.fromkeys(re.findall(r"`+ ?(pytest bench .*?) ?`+(?= measures|\.)", text)))


@pytest.fixture(scope="module")
def of_the_reference():
    rows = chosen_of_baselines(BASELINES, None, None)
    return [each for table in tables(rows) for each in printed(formats.markdown(table))]


@pytest.mark.process
def test_every_command_in_the_tables_of_the_reference_selects_tests_of_all_its_recipes(of_the_reference, pytester):
    found = list(dict.fromkeys(of_the_reference))
    assert len(found) > 10
    for each in found:
        words = shlex.split(each)
        assert ["pytest", "bench"] == words[:2]

        result = pytest_bench(pytester, "--pyargs", *words[1:], "--collect-only", "-q")

        assert result.ret == 0, each
        for recipe in split_recipes(words[words.index("--model") + 1]):
            assert f"[{recipe.partition('(')[0]}" in result.stdout.str(), each


def test_what_another_base_lacks_is_measured_with_the_settings_of_its_last_run(tmp_path):
    given = ("pytest bench -m quality --base '../my models/hf' --calibration ./texts --data ./texts --length=64 "
               "--model nf4 -n 2 --gate off --report out --allow-code-execution")  # fmt: skip
    contents = contents_of([row(SIZE, 1.0, base="hf"), row(SIZE, 2.0, "gptq", base="hf")])
    contents.records[0]["context"] |= {"base": "hf", "fingerprint": "cpu-test", "command": given}
    wanted = "--base '../my models/hf' --calibration ./texts --data ./texts --length=64 --allow-code-execution"

    write(tmp_path, contents.rows(), contents)

    found = printed((tmp_path / "tables.md").read_text())
    assert f"pytest bench -m efficiency --model fp16,nf4,gptq {wanted}" in found
    assert all(each.endswith(wanted) for each in found)
    assert "../my models/hf" in page(contents.rows(), contents)


def test_whoever_measured_reads_the_paths_and_others_that_they_are_to_put_their_own(tmp_path, capsys):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="r1") as journal:
        journal.start({"base": "hf", "base_hash": "b1", "fingerprint": "cpu-test",
                       "command": "pytest bench -m efficiency --base /srv/models/hf --model nf4"})  # fmt: skip
        journal.append(row(SIZE, 1.0, base="hf", base_hash="b1"))
        journal.end("passed")

    command(["report", "--journal", str(path), "--tables", "E14"])
    own = capsys.readouterr().out
    command(["report", "--journal", str(path), "--out", str(tmp_path / "out")])
    public = (tmp_path / "out" / "tables.md").read_text()

    assert printed(own) == ["pytest bench -m efficiency --model fp16,nf4 --base /srv/models/hf"]
    assert "/srv" not in public
    assert "--base '…/hf'`" in public
    assert SHORTENED in public
    assert SHORTENED not in own


def test_without_a_record_of_a_run_the_base_is_called_by_its_name():
    assert "pytest bench -m rag --model nf4 --base random:tiny" == measuring(["rag"], ["nf4"], "random:tiny")
    assert () == settings_of({}) == settings_of({"command": "pytest bench --base 'cut off"})


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12))
def test_whatever_the_base_is_called_the_command_is_one_line_that_names_it(name):
    shown = measuring(["efficiency"], ["nf4"], "hf", ("--base", name))

    assert len(shown.splitlines()) == 1
    assert "`" not in shown
    assert ("--base", name) == settings_of({"command": shown})
