"""README and docs/: short enough, no dead link, every command understood, outputs that are those of the commands."""

import configparser
import contextlib
import doctest
import functools
import importlib
import importlib.util
import io
import re
import tomllib

import pytest
import yaml
from docs_pages import DOCS, PAGES, PROGRAMS, ROOT, blocks, commands, declared, name

import compression.__main__
from bench import __main__ as bench
from bench.data.tasks.table import choose
from bench.session.plugin import MARKERS
from compression import Recipe, split_recipes

import outputs  # isort: skip - a script of docs/
from generator import command_lines, markdown  # isort: skip

README = ROOT / "README.md"
STANDS_FOR = {"RECIPE": "nf4", "COMMAND": "summary", "...": "reference"}
LISTS = ("all", "report", "orderings")  # of recipes
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
COMMANDS = list(dict.fromkeys(command for path in PAGES for command in commands(path)))


# --- README ----------------------------------------------------------------------------------------------------------


def test_readme_can_be_read_at_once():
    assert len(README.read_text().splitlines()) <= 120


def test_readme_leads_with_a_command_that_measures_and_one_that_tests():
    first, second, *_ = re.findall(r"^    (.+)$", README.read_text(), re.MULTILINE)
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ")
    assert first.endswith("&& OMP_NUM_THREADS=1 .venv/bin/pytest bench -m efficiency --model nf4")
    assert second.endswith('".[test]" && .venv/bin/pytest')


def test_readme_shows_twelve_methods_and_the_output_of_three_commands():
    text = README.read_text()
    table = text.split("<!-- table: docs/reference/methods.md")[1].split("<!-- end of table -->")[0]
    assert 12 == len(re.findall(r"^\| `(?!fp16`)\w+` \|", table, re.MULTILINE))
    assert 3 == len(list(outputs.places(text)))


def test_the_output_that_is_shown_is_of_the_command_in_its_marker():
    for place in outputs.places(README.read_text()):
        first, *output = place.shown.splitlines()[1:-1]
        assert f"$ {place.command}" == first
        assert output


def test_the_recommendation_that_is_shown_is_that_of_the_committed_baselines(monkeypatch):
    monkeypatch.chdir(ROOT)
    [place] = [place for place in outputs.places(README.read_text()) if "recommend" in place.command]
    [command] = [each for each in COMMANDS if each.words[:4] == ("python", "-m", "bench", "recommend")
                 and "--baselines" in each.words]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as said:
        bench.main(command.words[3:])

    shown = place.shown.splitlines()[2:-1]
    assert len(shown) >= 4
    assert [line for line in said.getvalue().splitlines() if line.startswith("|")] == shown


def test_the_sizes_that_are_shown_are_those_of_the_baseline():
    from generator.registries import recorded

    [place] = [place for place in outputs.places(README.read_text()) if "test_size" in place.command]
    for metric in ("bits_per_parameter", "compression_ratio", "model_size_gb"):
        [line] = [line for line in place.shown.splitlines() if metric in line]
        assert format(recorded("nf4", f"efficiency.{metric}")["value"], ".4g") in line


def test_the_scripts_examples_hold():
    assert [0, 0] == [doctest.testmod(module).failed for module in (outputs, markdown)]


# --- Links -----------------------------------------------------------------------------------------------------------

OUTSIDE = [*ROOT.glob("*.md"), ROOT / "bench" / "reference" / "README.md"]  # docs/ has a test of its own


@pytest.mark.parametrize("path", OUTSIDE, ids=name)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", re.sub(r"`[^`\n]*`", "", path.read_text()))
    assert [each for each in targets if not re.match(r"[a-z]+:", each) and not (path.parent / each).exists()] == []


EXAMPLES = {"compression/methods/quantization/weight_only/pow2.py"}  # that a reader is to write
NAMED = re.compile(r"(?<![\w./-])(?:bench|benchmarks|compression|tests|docs)/[\w/.-]+\.(?:py|md|json|c)\b")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_files_that_a_page_names_are_there(path):
    named = set(NAMED.findall(path.read_text())) - EXAMPLES
    assert [each for each in sorted(named) if not (ROOT / each).exists()] == []


def test_every_page_is_in_the_navigation_of_the_site_and_all_that_is_named_there_exists():
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"[\w/-]+\.md", text.split("nav:")[1]))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}

    assert named <= pages
    assert {"report/README.md", "report-smollm2/README.md"} == pages - named


def test_the_site_loads_nothing_from_elsewhere():
    table = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert table["theme"]["font"] is False
    assert not {"extra", "extra_css", "extra_javascript"} & set(table)


# --- Commands --------------------------------------------------------------------------------------------------------


def test_there_are_commands_of_every_program():
    assert set(PROGRAMS) <= {command.words[0] for command in COMMANDS}
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{name(command.page)}: {command.text}")
def test_a_command_is_understood(command):
    words = command.words[:-1] if command.words[-1] == "..." else command.words
    program, *arguments = (STANDS_FOR.get(word, word) for word in words)
    held = declared(command.page) if command.page.parent.name == "extend" else contextlib.nullcontext()
    try:
        with held:
            _UNDERSTANDS[program](arguments)
    except SystemExit:
        short = not any(word.startswith("-") for word in arguments[2:])
        assert short and not command.typed


@functools.cache
def parser_of_pytest():
    """What parses pytest's command line, with the options of the plugins that are installed."""
    from _pytest.config import get_config

    config = get_config()
    config.pluginmanager.load_setuptools_entrypoints("pytest11")
    if not config.pluginmanager.has_plugin("bench.session.plugin"):
        config.pluginmanager.import_plugin("bench.session.plugin")
    return config._parser


def _pytest(arguments):
    if arguments == ["--help"]:
        return
    given = parser_of_pytest().parse(arguments)
    if given.model and given.model not in LISTS:
        for text in split_recipes(given.model):
            Recipe.parse(text)
    choose(given.tasks)
    assert set(re.findall(r"\w+", given.markexpr)) <= {*MARKERS, "or", "and", "not", "process"}
    for path in given.file_or_dir:
        file, _, test = path.partition("::")
        assert (ROOT / file).exists()
        assert not test or f"def {test.partition('[')[0]}(" in (ROOT / file).read_text()


def _python(arguments):
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).exists()
    elif arguments[1] == "compression":
        given = command_lines.parser_of(compression.__main__.main).parse_args(arguments[2:])
        assert given.recipe in ("list", "convert") or Recipe.parse(given.recipe)
        assert given.recipe != "convert" or (len(given.folders) == 2 and bool(given.format) != bool(given.engine))
    elif arguments[1] == "bench":
        if arguments[2:] == []:
            raise SystemExit  # as it does where no command follows
        assert arguments[2] in bench.COMMANDS
        module = importlib.import_module(bench.COMMANDS[arguments[2]][0])
        command_lines.parser_of(module.main).parse_args(arguments[3:])
    else:
        assert importlib.util.find_spec(arguments[1])


def _pip(arguments):
    assert "install" == arguments[0]
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        assert set(extra.split(",")) <= set(EXTRAS)


def _tox(arguments):
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    assert arguments[:1] == ["-e"]
    assert arguments[1:] == [] or f"testenv:{arguments[1]}" in tox


def _ci(arguments):
    assert {part for each in arguments for part in each.split("|")} <= {"lint", "tests", "bench", "quick"}


def _any(arguments):
    pass


_UNDERSTANDS = {
    "pytest": _pytest, "python": _python, "python3": _python, "pip": _pip, "tox": _tox, ".ci/run": _ci,
    "pytest-benchmark": _any, "mkdocs": _any, ".": _any,
}  # fmt: skip


def test_the_gate_in_ci_is_ten_lines_of_a_workflow():
    [code] = blocks(README, "yaml")
    assert len(code.splitlines()) <= 10
    [job] = yaml.safe_load(code)["jobs"].values()
    assert ["pip", "pytest"] == [step["run"].split()[0] for step in job["steps"] if "run" in step]
