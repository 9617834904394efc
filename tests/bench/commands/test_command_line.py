"""`python -m compression` and `python -m bench`."""

import json

import pytest

from bench.__main__ import COMMANDS
from bench.__main__ import main as bench_main
from compression.__main__ import main


def test_a_recipe_is_written_and_opens_again(folder, tmp_path, capsys):
    assert main(["rtn(group_size=32)", "--base", str(folder), "--out", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    from compression import load

    assert load(tmp_path / "out").stored_bytes == facts["stored_bytes"]
    assert facts["recipe"] == "rtn(group_size=32)"


def test_the_list_names_every_method_with_its_parameters_and_a_kernel(capsys):
    from compression import list_methods

    assert main(["list", "--device", "cpu", "--json"]) == 0
    entries = {entry["method"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert sorted(entries) == sorted(list_methods())
    assert all(entry["kernels"] for entry in entries.values())
    assert [text.split()[0] for text in entries["rtn"]["kernels"]] == [f"rtn(bits={bits})" for bits in range(2, 9)]


def test_the_list_is_readable(capsys):
    assert main(["list", "--device", "cpu"]) == 0
    assert "nf4, q (quantization): 4-bit NormalFloat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nf4"], "--out DIR is missing"),
        (["nf5", "--out", "x"], "did you mean nf4"),
        (["nf4", "--base", "refrence", "--out", "x"], "did you mean reference"),
        (["rtn(group_size=100)", "--base", "random:qwen2.5-3b", "--out", "{tmp}/x"], "near it: 16, 32, 64, 128"),
        (["nf4", "--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_bad_input_is_said_in_one_line_and_exits_with_2(arguments, words, tmp_path, capsys):
    assert main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_the_summary_prints_the_last_run_of_a_journal_as_markdown(tmp_path, capsys):
    from bench.commands.summary import main as summary
    from bench.results.journal import Journal
    from bench.results.row import Row

    common = {"base": "b", "device": "d", "better": "lower", "seed": 0}
    for value in (1.0, 2.0):
        with Journal(tmp_path / "journal.jsonl") as journal:
            journal.start({})
            journal.append(Row(run=journal.run, recipe="nf4", metric="efficiency.decode_ms", value=value,
                               unit="ms/token",
                               ratio=value / 4, base_value=4.0, of="generation", **common))  # fmt: skip
            journal.append(Row(run=journal.run, recipe="nf4", metric="efficiency.energy_mj_per_token", value=None,
                               unit="mJ/token", status="failed", reason="why", of="energy", **common))  # fmt: skip
            journal.end("passed")
    summary(["--journal", str(tmp_path / "journal.jsonl")])
    printed = capsys.readouterr().out
    assert "2 0.500x" in printed
    assert "failed" in printed
    assert "0.250x" not in printed
    summary(["--journal", str(tmp_path / "journal.jsonl"), "--metrics", "decode_ms"])
    assert "energy" not in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_bench_is_there_and_tells_its_options(command, capsys):
    with pytest.raises(SystemExit) as end:
        bench_main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: python -m bench {command}" in capsys.readouterr().out


def test_an_unknown_command_of_bench_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as end:
        bench_main(["summry"])
    assert end.value.code == 2
    assert "'summry' (choose from summary" in capsys.readouterr().err.replace("'summary'", "summary")
