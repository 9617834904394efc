"""What docstrings and README claim is run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from scripts import benchmark

import bench
import compression
from bench.metrics import all_metrics

ROOT = Path(bench.__file__).parents[1]
layers, splice = benchmark("layers"), benchmark("splice")

SKIPPED = ("__main__", "bench.test_", "memory_process", "against.side", "engines.processes.", "sandbox.warden")
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
    text = "".join(path.read_text() for path in (ROOT / "docs" / "methodology").glob("*.md"))
    for metric in all_metrics().values():
        assert metric.title
        if metric.group == "efficiency" and metric.of != "cost":
            assert f"`{metric.name.partition('.')[2]}`" in text or metric.name.endswith(".parameters")


def test_every_name_in_all_is_there():
    assert [name for name in compression.__all__ if not hasattr(compression, name)] == []


def test_no_public_text_names_a_path_of_one_machine():
    tracked = [p for suffix in ("*.py", "*.md", "*.toml", "*.ini", "*.c") for p in ROOT.rglob(suffix)]
    own = [p for p in tracked if not {".venv", ".tox", "build", "site"} & set(p.relative_to(ROOT).parts)]
    assert own
    assert [str(p) for p in own if re.search(r"(?<![\w.])/(?:home|Users)/\w+", p.read_text())] == []


# --- Tables ----------------------------------------------------------------------------------------------------------


def rows_of(text):
    """Heading and rows of the tables of a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


TABLES = [(path, place) for path in splice.pages() for place in splice.places(path.read_text())]


@pytest.mark.parametrize(("path", "place"), TABLES, ids=[f"{path.stem}-{place.heading}" for path, place in TABLES])
def test_a_table_between_markers_has_the_heading_and_all_rows_of_its_source(path, place):
    section = re.split(rf"^#+ {re.escape(place.heading)}$", (ROOT / place.file).read_text(), flags=re.MULTILINE)[1]
    own = rows_of(re.split(r"^#", section, flags=re.MULTILINE)[0])

    assert len(own) >= 3
    assert own == rows_of(place.body)
    assert splice.table(ROOT / place.file, place.heading) == place.body.rstrip("\n")


def test_one_command_finds_every_page_and_all_are_up_to_date():
    names = {path.relative_to(ROOT).as_posix() for path in splice.pages()}

    assert {"README.md", "docs/methodology/gate-power.md", "bench/reference/README.md"} <= names
    assert [path for path in splice.pages() if splice.spliced(path.read_text()) != path.read_text()] == []


def test_the_picture_of_the_layers_is_that_of_the_import_rules():
    if "importlinter" not in (ROOT / "pyproject.toml").read_text():
        pytest.skip("pyproject.toml has no import rules yet")
    assert layers.FILE.read_text() == layers.text(), "run python benchmarks/layers.py && python benchmarks/splice.py"


def test_a_row_of_another_table_does_not_stay(tmp_path):
    """What a test of single lines lets pass: every row is in the file, one of them in another table."""
    (tmp_path / "report.md").write_text("# a\n\n| x |\n|---|\n| 1 |\n| 2 |\n\n# b\n\n| y |\n|---|\n| 3 |\n")
    pasted = "<!-- table: report.md: a -->\n| x |\n|---|\n| 3 |\n| 2 |\n<!-- end of table -->\n"

    assert pasted.replace("| 3 |", "| 1 |") == splice.spliced(pasted, tmp_path)
    with pytest.raises(ValueError, match="no heading 'c'"):
        splice.spliced(pasted.replace(": a", ": c"), tmp_path)
    with pytest.raises(OSError, match=r"none\.md"):
        splice.spliced(pasted.replace("report", "none"), tmp_path)


def test_the_command_that_measured_a_table_is_written_below_it(tmp_path):
    (tmp_path / "power.md").write_text("# a\n\nMeasured by `python power.py`.\n\n| x |\n|---|\n| 1 |\n\nText.\n")
    begin, end = "<!-- table: power.md: a -->\n", "<!-- end of table -->"

    expected = f"{begin}| x |\n|---|\n| 1 |\n\nMeasured by `python power.py`.\n{end}"
    assert expected == splice.spliced(begin + end, tmp_path)
    assert expected == splice.spliced(expected, tmp_path)


def is_of_figures(rows):
    """Whether at least half of the cells behind the first column are numbers, with an interval or a unit sign."""
    cells = [cell for row in rows[2:] for cell in row[1:] if cell]
    return (
        2 * sum(re.fullmatch(r"[-+*\u2212\u00b1\d.,;()\[\] %x]+", cell) is not None for cell in cells) >= len(cells) > 0
    )


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "methodology").glob("*.md")), ids=lambda path: path.stem)
def test_every_table_of_figures_stands_between_markers(path):
    outside = re.sub(r"<!-- table: .*?<!-- end of table -->", "", path.read_text(), flags=re.DOTALL)
    tables = [rows_of(found[0]) for found in re.finditer(r"(?:^\|.*\n)+", outside, re.MULTILINE)]
    assert [rows[0] for rows in tables if is_of_figures(rows)] == []


def test_a_table_of_figures_is_recognized():
    assert is_of_figures(rows_of("| x | a | b |\n|---|---|---|\n| nf4 | 1 | -0.5 |"))
    assert not is_of_figures(rows_of("| x | a | b |\n|---|---|---|\n| nf4 | 4 bits | 0 shots |\n| rtn | own | own |"))


# --- Pages -----------------------------------------------------------------------------------------------------------

DOCS = ROOT / "docs"
METHODOLOGY = [path for path in sorted((DOCS / "methodology").glob("*.md")) if path.stem != "index"]
SECTIONS = ["Question", "Decision", "Evidence", "Limits"]
WORDS = 900  # of a page


@pytest.mark.parametrize("path", METHODOLOGY, ids=lambda path: path.stem)
def test_a_page_of_the_methodology_has_four_sections_in_order_and_a_command(path):
    text = path.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    evidence = text.split("## Evidence")[1].split("## Limits")[0]
    assert re.search(r"(?:python|pytest|tox) ", evidence) or re.search(r"`tests/test_\w+\.py", evidence)


SHORT = [
    path for folder in ("methodology", "concepts", "contributing") for path in sorted((DOCS / folder).glob("*.md"))
]


@pytest.mark.parametrize("path", SHORT, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_page_can_be_read_in_five_minutes(path):
    assert len(path.read_text().split()) <= WORDS


def anchors(text):
    """The anchors of the headings of a page, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.relative_to(DOCS).as_posix())
def test_relative_links_lead_somewhere(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        if not page.exists() or (anchor and anchor not in anchors(page.read_text())):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("path", METHODOLOGY, ids=lambda path: path.stem)
def test_files_that_a_page_names_are_there(path):
    named = re.findall(r"\b(?:bench|benchmarks|compression|tests|docs)/[\w/.-]+\.(?:py|md|json)\b", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_of_the_methodology_is_in_its_index():
    index = (DOCS / "methodology" / "index.md").read_text()
    assert [path.name for path in METHODOLOGY if f"({path.name})" not in index] == []
