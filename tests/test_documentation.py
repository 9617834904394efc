"""What docstrings and README claim is run."""

import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import bench
import compression
from bench.metrics import all_metrics

ROOT = Path(bench.__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import splice  # noqa: E402 - from the folder named above

SKIPPED = ("__main__", "bench.test_", "memory_process", "against.side", "sandbox.warden")
MODULES = [
    module.name
    for package in (bench, compression)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not any(part in module.name for part in SKIPPED)
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder()
    assert sum(bool(t.examples) for name in MODULES for t in finder.find(importlib.import_module(name))) >= 10


def test_every_metric_is_described_and_methodology_names_it():
    text = (ROOT / "METHODOLOGY.md").read_text()
    for metric in all_metrics().values():
        assert metric.title
        if metric.group == "efficiency" and metric.of != "cost":
            assert f"`{metric.name.partition('.')[2]}`" in text or metric.name.endswith(".parameters")


def test_every_name_in_all_is_there():
    assert [name for name in compression.__all__ if not hasattr(compression, name)] == []


def test_no_public_text_names_a_path_of_one_machine():
    tracked = [p for suffix in ("*.py", "*.md", "*.toml", "*.ini", "*.c") for p in ROOT.rglob(suffix)]
    own = [p for p in tracked if not {".venv", ".tox", "build"} & set(p.relative_to(ROOT).parts)]
    assert own
    assert [str(p) for p in own if re.search(r"(?<![\w.])/(?:home|Users)/\w+", p.read_text())] == []


def rows_of(lines):
    """Heading and rows of the tables among lines."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_measured_table_in_readme_is_one_table_of_the_report_with_its_heading_and_all_rows():
    first = re.split(r"^#+ ", (ROOT / "docs" / "report" / "tables.md").read_text(), flags=re.MULTILINE)[2]
    measured = (ROOT / "README.md").read_text().split("\n## Measured\n")[1].split("\n## ")[0]

    assert len(rows_of(measured.splitlines())) > 20
    assert rows_of(first.splitlines()) == rows_of(measured.splitlines())


TEXTS = [path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md"))
         if "<!-- table:" in path.read_text()]  # fmt: skip


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_tables_that_come_from_files_are_those_of_the_files(path):
    assert splice.spliced(path.read_text()) == path.read_text()


def test_a_row_of_another_table_does_not_stay(tmp_path):
    """What a test of single lines lets pass: every row is in the file, one of them in another table."""
    (tmp_path / "report.md").write_text("# a\n\n| x |\n|---|\n| 1 |\n| 2 |\n\n# b\n\n| y |\n|---|\n| 3 |\n")
    pasted = "<!-- table: report.md: a -->\n| x |\n|---|\n| 3 |\n| 2 |\n<!-- end of table -->\n"

    assert pasted.replace("| 3 |", "| 1 |") == splice.spliced(pasted, tmp_path)
    with pytest.raises(ValueError, match="no heading 'c'"):
        splice.spliced(pasted.replace(": a", ": c"), tmp_path)
    with pytest.raises(OSError, match=r"none\.md"):
        splice.spliced(pasted.replace("report", "none"), tmp_path)
