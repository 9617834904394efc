"""The command end to end on a real checkpoint: what is measured, printed, and left in journal, storage and report."""

import json
import re
import sys
from itertools import permutations

import pytest
from commands import FILES, PERPLEXITY, QUICK, RTN, SIZE, SPEED
from processes import completed

from bench.__main__ import main as command
from bench.commands.history import of_storage
from bench.results.journal import read

pytest_plugins = ["pytester"]


def test_speed_is_measured_beside_the_base_in_the_same_rounds(run, pytester):
    run(SPEED, "--model", RTN, "--batch-size", "1,2", *QUICK).assert_outcomes(passed=2)
    rows = [json.loads(line) for line in (pytester.path / ".bench" / "journal.jsonl").read_text().splitlines()]
    decode = [r for r in rows if r["kind"] == "row" and r["metric"] == "efficiency.decode_ms"]
    assert [r["params"]["batch"] for r in decode] == [1, 2]
    assert all(len(r["samples"]) == len(r["base_samples"]) == 2 for r in decode)
    assert rows[-1]["kind"] == "end"


@pytest.mark.process
def test_pytest_benchmark_keeps_and_compares_our_runs_and_history_reads_them(run, pytester):
    for _ in range(2):
        run(SPEED, "--model", f"fp16,{RTN}", "--benchmark-autosave", *QUICK).assert_outcomes(passed=2)

    compare = [sys.executable, "-m", "pytest_benchmark", "compare"]
    compared = completed(compare, cwd=pytester.path, check=True).stdout

    assert compared.count("benchmark 'someones-llama (") == 1  # one table of all recipes under one load
    assert "generation[batch=1,mode=eager,new_tokens=4,prompt_tokens=8]': 4 tests" in compared
    for name in ("fp16", RTN):
        assert len(re.findall(rf"test_generation\[{re.escape(name)}-b1-eager\] \(000[12]_", compared)) == 2
    for file in (pytester.path / ".benchmarks").glob("*/*.json"):
        params = [each["params"] for each in json.loads(file.read_text())["benchmarks"]]
        assert [{"recipe": name, "batch_size": 1, "mode": "eager"} for name in ("fp16", RTN)] == params
    stored = of_storage(pytester.path / ".benchmarks")
    assert [("someones-llama", "fp16", 2), ("someones-llama", RTN, 2)] == [
        (each.base, each.recipe, len(each.points)) for each in stored
    ]
    assert all(0 < value < 60 for each in stored for value in each.values)


@pytest.mark.process
def test_memory_is_that_of_the_recipe_also_when_it_is_measured_alone(run, pytester):
    memory = f"{FILES / 'test_efficiency.py'}::test_memory"
    run(memory, "--model", f"{RTN},rtn(bits=8,group_size=32)", *QUICK).assert_outcomes(passed=2)
    rows = [json.loads(line) for line in (pytester.path / ".bench" / "journal.jsonl").read_text().splitlines()]
    shares = {r["recipe"]: r["value"] for r in rows if r.get("metric") == "efficiency.memory_efficiency"}
    peaks = {r["recipe"]: r["value"] for r in rows if r.get("metric") == "efficiency.peak_memory_mb"}
    stored = {recipe: shares[recipe] * peaks[recipe] for recipe in shares}
    assert len(stored) == 2
    assert min(stored.values()) < 0.8 * max(stored.values())


STEPS = (
    "p(samples=2,sequence_length=16,round_to=32)",
    "kd(samples=4,sequence_length=16,epochs=1,batch=2,accumulation=2)",
    "rtn(group_size=32)",
)


def test_the_command_prints_the_table_of_orders_of_anybodys_steps(run, pytester, text_folder, tmp_path):
    (tmp_path / "train.txt").write_text("\n\n".join(f"Sentence {n} of a text to learn from." for n in range(200)))
    orders = ["-".join(order) for order in permutations(STEPS)][:2]
    arguments = (
        "--data",
        text_folder,
        "--calibration",
        tmp_path,
        "--teacher",
        "self",
        "--samples",
        "2",
        "--length",
        "32",
    )

    result = run(SIZE, PERPLEXITY, "-v", "--model", ",".join(["fp16", *STEPS, *orders]), *arguments)

    result.assert_outcomes(passed=12)
    shown = result.stdout.str()
    assert "Orders of kd(" in shown
    assert re.search(r"p\(.*: p\(.*\) [\d.]+ s, kd\(.*\) [\d.]+ s, rtn\(group_size=32\) [\d.]+ s", shown)
    assert "the best" in shown
    command(["report", "--journal", str(pytester.path / ".bench/journal.jsonl"), "--tables", "S4"])


def test_the_report_is_of_all_that_the_journal_holds(run, pytester, text_folder):
    """Two runs of one metric each: the report of the second has the values of both, and summary of the second."""
    run(SIZE, "--model", RTN).assert_outcomes(passed=1)
    result = run(
        PERPLEXITY, "--model", RTN, "--data", text_folder, "--samples", "2", "--length", "32", "--report", "out"
    )

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["report: *tables.md"])
    rows = json.loads((pytester.path / "out/results.json").read_text())
    journal = read(pytester.path / ".bench/journal.jsonl").rows()
    assert {(row.key, row.value) for row in journal} == {(row["key"], row["value"]) for row in rows}
    tables = (pytester.path / "out/tables.md").read_text()
    assert "### Table E14" in tables
    assert "### Table E20" in tables
    assert f"run {journal[-1].run}" in (pytester.path / "out/summary.md").read_text()


def test_speed_is_measured_with_pytest_benchmark_switched_off(run):
    run(SPEED, "--model", RTN, "--benchmark-disable", *QUICK).assert_outcomes(passed=1)


def test_a_recipe_that_runs_out_of_memory_leaves_rows_that_say_so_and_the_rest_completes(run, pytester, monkeypatch):
    from compression.methods.quantization.weight_only.rtn import RTN as Method

    def explode(self, linear, context, sound=Method.compress_linear):
        if context is None:  # it is asked what it stores
            return sound(self, linear, context)
        raise MemoryError("no room")

    monkeypatch.setattr(Method, "compress_linear", explode)
    result = run(SIZE, "--model", f"{RTN},nf4(group_size=32)")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*out of memory*"])
    rows = [json.loads(line) for line in (pytester.path / ".bench" / "journal.jsonl").read_text().splitlines()]
    assert {r["status"] for r in rows if r["kind"] == "row" and r["recipe"] == RTN} == {"out_of_memory"}


def test_what_became_of_each_layer_is_in_the_journal_once_for_each_recipe(run, pytester):
    run(SIZE, f"{FILES / 'test_efficiency.py'}::test_cost", "--model", f"fp16,{RTN}").assert_outcomes(passed=4)

    lines = (pytester.path / ".bench" / "journal.jsonl").read_text().splitlines()
    records = [each for each in map(json.loads, lines) if each["kind"] == "layers"]
    assert ["fp16", RTN] == [each["recipe"] for each in records]
    (deep,) = [each for each in records[1]["layers"] if each["name"] == "model.layers.1.mlp.down_proj"]
    assert 4 < deep["bits"] < 6
    assert 0 < deep["error"] < 0.2
