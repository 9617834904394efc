"""Hostile names through every output: no markup, no formula, no line or command of their own."""

import csv
import io
import json
import re
from contextlib import suppress
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import completed
from report_rows import LATENCY, LOAD, PERPLEXITY, SIZE, contents_of, row

from bench.__main__ import main as command
from bench.gate.verdicts import Verdict
from bench.report import escaping, formats
from bench.report.page import page
from bench.report.pull_request import digest
from bench.report.tables import tables
from bench.report.write import write
from bench.results.journal import Journal
from bench.session.summary import ending, lines
from compression.files.terminal import Lines, terminal

ESCAPE = "\x1b[31m"
HOSTILE = [
    "<img src=x onerror=alert(1)>", "a</script><b>", '"><svg onload=alert(1)>', "{{ 7 * 7 }}", "a|b`c`*d*_e_",
    "[click](http://evil.test)", "![x](http://evil.test/x.png)", "[x]: http://evil.test", "@someone",
    "# heading", "=HYPERLINK(\"http://evil.test\")", "+1", "-1+1", "\t=1", "\\input{/etc/passwd}", "$x^2_1$ % & ~ #{}",
    "[2]", "*", f"{ESCAPE}red\x07\x9b2J", "one\ntwo", "\r\n::error title=x::passed", "::add-mask::a",
    "##[error]passed", "ok ##[set-output name=a]b", "[bold red]rich[/]", "\u202egnp.exe", "`; rm -rf ~ #`", "\udcff",
]  # fmt: skip
texts = st.sampled_from(HOSTILE) | st.text(st.characters(exclude_characters="\0"), max_size=20)


def results(name, layers="plain"):
    """Rows whose base, device, conditions and reasons are called so, and their journal; the recipe names layers."""
    known = {"base": name, "device": f"cpu {name}"}
    recipe = f"nf4(layers={json.dumps({layers: None})})" if layers.isascii() and layers.isprintable() else "nf4"
    rows = [
        row(SIZE, 1.0, recipe, base_value=2.0, **known),
        row(PERPLEXITY, 2.0, recipe, base_value=2.0, params={"data": name}, **known),
        row(LATENCY, None, recipe, status="failed", reason=f"{name}: {name}", params=LOAD, **known),
    ]
    contents = contents_of(rows, [("regressed", 3)])
    contents.records[0]["context"] |= {
        "base": name, "fingerprint": f"cpu {name}", "commit": name,
        "command": escaping.shell(["pytest", "bench", "--base", name]),
    }  # fmt: skip
    contents.records[-2]["words"] = f"{recipe}: {name}"
    return rows, contents


class Elements(HTMLParser):
    """Tags and attributes that a browser sees, but for those of the document's own."""

    def __init__(self, text):
        super().__init__()
        self.seen = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, tuple(sorted(name for name, _ in attrs))))


@pytest.mark.parametrize("name", HOSTILE)
def test_the_files_of_a_report_hold_a_name_as_text(name, tmp_path):
    plain, hostile = (results(each, name) for each in ("plain", name))
    for folder, (rows, contents) in (("plain", plain), ("hostile", hostile)):
        surrogates = any("\ud800" <= letter <= "\udfff" for letter in name)
        if surrogates:  # no file can hold them: they are told in tables and the terminal alone
            continue
        write(tmp_path / folder, rows, contents)
    if not (tmp_path / "hostile").exists():
        return

    def text(folder, file):
        return (tmp_path / folder / file).read_bytes().decode()

    own = {"html", "head", "meta", "title", "style", "body", "h1", "figure", "table", "caption", "thead", "tbody",
           "tr", "th", "td", "strong", "sup", "figcaption", "ol", "li", "p"}  # fmt: skip
    assert {tag for tag, _ in Elements(text("hostile", "tables.html")).seen} <= own
    assert {each[0] for each in Elements(text("hostile", "index.html")).seen} == {
        each[0] for each in Elements(text("plain", "index.html")).seen
    }
    assert not {attribute for _, names in Elements(text("hostile", "index.html")).seen for attribute in names
                if attribute.startswith("on")}  # fmt: skip
    for file in ("tables.md", "summary.md", "tables.tex", "tables.html", "index.html"):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text("hostile", file)), file
        assert len(text("hostile", file).splitlines()) == len(text("plain", file).splitlines()), file
    for cells in csv.reader(io.StringIO(text("hostile", "results.csv"))):
        assert not any(cell.startswith(("=", "@", "\t", "\r", "\n")) for cell in cells)
        assert not any(cell[:1] in "+-" and cell[1:2].isalpha() for cell in cells if cell)
    assert [name] * 3 == [each["base"] for each in json.loads(text("hostile", "results.json"))]


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_has_no_link_image_element_heading_or_mention_of_a_name(name):
    rows, contents = results(name, name)
    for shown in (digest(contents), *map(formats.markdown, tables(rows))):
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", shown)  # code is text
        assert not re.search(r"(?<!\\)\]\(|<(?![!])\w|^\s*\[[^\]]*\]:|(?<!\w)@\w", outside, re.MULTILINE)
        assert not re.search(r"^(?:- )?#(?!#)", outside, re.MULTILINE)
        table = [line for line in shown.splitlines() if line.startswith("|")]
        widths = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table}
        assert len(widths) <= 1


@given(texts)
def test_a_line_for_a_terminal_is_one_line_without_controls_or_commands(name):
    shown = terminal(name)

    assert len(shown.splitlines()) <= 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", shown)
    assert not shown.lstrip().startswith("::")
    assert "##[" not in shown


@given(st.lists(texts, max_size=4))
def test_what_a_command_prints_has_only_its_own_lines_and_no_commands_to_a_runner(parts):
    out = io.StringIO()

    print(*parts, sep="\n", file=Lines(out))

    for line in out.getvalue().split("\n"):
        assert not line.lstrip().startswith("::")
        assert "##[" not in line
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", line)


@pytest.mark.parametrize("name", [each for each in HOSTILE if each.isprintable() or "\x1b" in each or "\n" in each])
def test_commands_and_the_summary_of_a_run_print_a_name_harmlessly(name, tmp_path, capfd):
    rows, _ = results(name, name)
    with Journal(tmp_path / "journal.jsonl", run="r1") as journal:
        journal.start({})
        for each in rows:
            journal.append(each)
        journal.end("passed")
    for arguments in (["recommend"], ["summary"], ["digest"], ["history", "--metric", "model_size_gb"],
                      ["report", "--tables", "E99"], ["report", "--base", name + "x"]):  # fmt: skip
        with suppress(SystemExit):
            command([*arguments, "--journal", str(tmp_path / "journal.jsonl")])
    verdicts = {
        (each.recipe, each.key): Verdict(
            recipe=each.recipe, key=each.key, outcome="regressed", words=f"{name}\n{name}", fails=True, cause=name
        )
        for each in rows
    }
    workbench = SimpleNamespace(
        rows={(each.recipe, each.key): each for each in rows}, verdicts=verdicts, baselines={}, proposals=[],
        kernels={name: {name: 1}}, notes={name: (name,)}, steps={name: ((name, 1.0), (name, 2.0))}, fingerprint=name,
        source=SimpleNamespace(label=name), journal=SimpleNamespace(path=name),
        options=SimpleNamespace(gate="auto", update=False, command="pytest bench", baselines=name, record_command=name),
    )  # fmt: skip
    said = "".join(capfd.readouterr()) + "\n".join([*lines(workbench, verbose=True), *ending(workbench, [name])])

    for line in said.split("\n"):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", line)
        assert not line.lstrip().startswith("::")
        assert "##[" not in line


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12))
def test_a_word_of_a_command_is_the_word_that_a_shell_reads(word):
    shown = escaping.shell(["printf", "%s", word])

    assert len(shown.splitlines()) == 1
    assert "`" not in shown
    assert ["printf", "%s", word] == escaping.words_of(shown)
    if set(word) & set("`\n\x1b'\\") or len(word) > 8:  # a process for some of them
        assert word.encode() == completed(["bash", "-c", shown], check=True, text=False).stdout


def test_the_progress_bar_takes_no_markup_of_a_name():
    from rich.console import Console
    from rich.markup import escape

    console = Console(file=io.StringIO(), width=80)
    console.print(escape(terminal("[bold red]rich[/] \x1b[2J")))

    assert "[bold red]rich[/] \\x1b[2J" in console.file.getvalue()


@pytest.mark.parametrize("name", ["[2]", "*", "$x$", "a_b", "50 %", "\\end{table}", "~^{}"])
def test_latex_takes_no_argument_or_command_from_a_name(name):
    shown = escaping.latex(name)

    assert not shown.startswith(("[", "*"))
    assert not re.search(r"(?<!\\)[$%&_#]", shown)
    assert not re.search(r"\\(?!textbackslash|textasciitilde|textasciicircum|[&%$#_{}])", shown)


def test_a_page_of_hostile_names_keeps_its_data():
    rows, contents = results("a</script><b>")

    assert page(rows, contents).count("</script>") == page(*results("plain")).count("</script>")
