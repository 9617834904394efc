"""The command end to end: real checkpoint folders, real runs of pytest, baselines that are broken on purpose."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise, permutations

import pytest
from commands import FILES, pytest_bench

from bench.__main__ import main as command
from bench.history import of_storage
from bench.results import read
from bench.sign import sign

pytest_plugins = ["pytester"]

SIZE = f"{FILES / 'test_efficiency.py'}::test_size"
SPEED = f"{FILES / 'test_efficiency.py'}::test_generation"
ENERGY = f"{FILES / 'test_efficiency.py'}::test_energy"
QUALITY = f"{FILES / 'test_quality.py'}::test_perplexity"
QUIETLY = ["-q", "-p", "bench.plugin", "-p", "no:cacheprovider"]
QUICK = ("--runs", "2", "--warmup-runs", "0", "--prompt-tokens", "8", "--max-new-tokens", "4")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A Llama that this project did not write: transformers' own random weights, saved by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from compression._checkpoint import byte_tokenizer

    folder = tmp_path_factory.mktemp("checkpoints") / "someones-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "test.txt").write_text("The quick brown fox jumps over the lazy dog, twice a day. " * 60)
    return folder


@pytest.fixture
def run(pytester, checkpoint, imported):
    """Run the benchmarks in a repository of somebody else's."""

    def call(*arguments, base=None):
        return pytest_bench(pytester, "--base", base or checkpoint, *arguments)

    return call


def _baseline(pytester, recipe="rtn-group-size-32"):
    found = [p for p in (pytester.path / "baselines" / "someones-llama").glob("*.json") if recipe in p.name]
    assert len(found) == 1
    return found[0]


RTN = "rtn(group_size=32)"


def test_a_recipe_without_a_baseline_passes_and_is_told_how_to_record_one(run):
    result = run(SIZE, "--model", RTN)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*efficiency.stored_bytes (B)*", "*nothing to compare with*--update-baselines"])


def test_strict_fails_without_a_baseline(run):
    result = run(SIZE, "--model", RTN, "--gate", "strict")
    result.assert_outcomes(failed=1)


def test_a_recorded_run_passes_and_one_more_stored_byte_fails_with_words(run, pytester):
    run(SIZE, "--model", RTN, "--update-baselines").assert_outcomes(passed=1)
    run(SIZE, "--model", RTN, "--gate", "strict").assert_outcomes(passed=1)
    path = _baseline(pytester)
    recorded = json.loads(path.read_text())
    recorded["rows"]["efficiency.stored_bytes"]["value"] -= 1
    path.write_text(json.dumps(recorded))
    unsigned = run(SIZE, "--model", RTN)
    assert unsigned.ret == pytest.ExitCode.USAGE_ERROR
    unsigned.stderr.fnmatch_lines([f"*is not what was recorded*python -m bench sign *{path.name}*"])
    sign(path)
    result = run(SIZE, "--model", RTN)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*efficiency.stored_bytes regressed*"])


def test_a_run_with_update_does_not_touch_what_it_did_not_measure(run, pytester, text_folder):
    run(SIZE, "--model", RTN, "--update-baselines").assert_outcomes(passed=1)
    run(QUALITY, "--model", RTN, "--data", text_folder, "--length", 32, "--update-baselines").assert_outcomes(passed=1)
    rows = json.loads(_baseline(pytester).read_text())["rows"]
    assert "efficiency.stored_bytes" in rows
    assert any(key.startswith("quality.perplexity") for key in rows)


def test_losses_and_divergence_are_recorded_by_window_and_gated_by_them(run, pytester, text_folder):
    divergence = f"{FILES / 'test_quality.py'}::test_divergence"
    settings = (QUALITY, divergence, "--model", RTN, "--data", text_folder, "--length", 32)
    recorded = run(*settings, "--update-baselines")
    recorded.assert_outcomes(passed=2)
    recorded.stdout.re_match_lines(
        [r"quality\.nll.*x  [+-].* \[", r"quality\.perplexity.*x  \[", r"quality\.kl_to_base.*  \+.* \[\+"]
    )
    run(*settings, "--gate", "strict").assert_outcomes(passed=2)

    path = next((pytester.path / "baselines" / "someones-llama" / "items").glob("*.json"))
    table = json.loads(path.read_text())
    assert 4 == len(table["rows"]) and 1 == len({row["asked"] for row in table["rows"].values()})
    path.write_text(path.read_text().replace('"values": "', '"values": "AAAA', 1))
    damaged = run(*settings)
    assert damaged.ret == pytest.ExitCode.USAGE_ERROR
    damaged.stderr.fnmatch_lines([f"*items*{path.name}*restore it from version control*"])


def test_programs_that_may_not_be_run_do_not_fail_against_a_baseline_of_a_run_that_ran_them(run):
    scores = [f"{FILES / 'test_quality.py'}::{name}" for name in ("test_task", "test_average")]
    settings = (*scores, "--model", "fp16", "--data", "embedded", "--tasks", "humaneval,hellaswag", "--limit", 2)
    run(*settings, "--allow-code-execution", "--update-baselines", base="reference").assert_outcomes(passed=3)

    unasked = run(*settings, base="reference")

    unasked.assert_outcomes(passed=3)
    unasked.stdout.re_match_lines([r".*task=humaneval.*--allow-code-execution"])
    run(*settings, "--allow-code-execution", "--gate", "strict", base="reference").assert_outcomes(passed=3)


def test_a_failed_run_records_nothing(run, pytester):
    pytester.makepyfile(test_other="def test_fails():\n    assert False")
    result = run(SIZE, "test_other.py", "--model", RTN, "--update-baselines")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*baselines were not updated*"])
    assert not (pytester.path / "baselines").exists()


def test_what_a_failed_run_did_measure_is_recorded_by_force(run, pytester):
    pytester.makepyfile(test_other="def test_fails():\n    assert False")
    result = run(SIZE, "test_other.py", "--model", RTN, "--update-baselines", "--force-update")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert json.loads(_baseline(pytester).read_text())["context"]["forced"] is True


def test_nothing_is_recorded_from_a_tree_with_changed_files_unless_forced(run, pytester):
    (pytester.path / "method.py").write_text("a = 1")
    for words in ("init -q", "add method.py", "-c user.name=a -c user.email=a@b.example commit -qm a"):
        subprocess.run(["git", *words.split()], cwd=pytester.path, check=True)
    (pytester.path / "method.py").write_text("a = 2")

    refused = run(SIZE, "--model", RTN, "--update-baselines")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*1 tracked files differ*(method.py); commit or stash them*--force-update*"])
    assert not (pytester.path / ".bench").exists()

    run(SIZE, "--model", RTN, "--update-baselines", "--force-update").assert_outcomes(passed=1)
    assert json.loads(_baseline(pytester).read_text())["context"]["commit"].endswith("+")


def test_a_vanished_metric_is_missed(run, pytester, monkeypatch):
    from bench.metrics._registry import METRICS

    run(SIZE, "--model", RTN, "--update-baselines").assert_outcomes(passed=1)
    monkeypatch.delitem(METRICS, "efficiency.model_size_gb")
    result = run(SIZE, "--model", RTN)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*efficiency.model_size_gb is in the baseline but was not measured*"])


def test_another_checkpoint_under_the_same_name_does_not_pass(run, pytester, checkpoint, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    run(SIZE, "--model", RTN, "--update-baselines").assert_outcomes(passed=1)
    other = tmp_path / "someones-llama"
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += torch.ones_like(tensors["model.norm.weight"])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = run(SIZE, "--model", RTN, base=other)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*base_hash*"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "baseline"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "schema=99"),
        (lambda text: text.replace('"value": ', '"value": NaN, "was": ', 1), "NaN"),
        (lambda text: text.replace('"rows": {', '"rows": {"efficiency.stored_bytes": {}, ', 1), "stored_bytes"),
    ],
    ids=["not-json", "another-schema", "nan", "duplicate-row"],
)  # fmt: skip
def test_a_damaged_baseline_stops_the_run_before_it_starts(run, pytester, damage, words):
    run(SIZE, "--model", RTN, "--update-baselines")
    path = _baseline(pytester)
    path.write_text(damage(path.read_text()))
    result = run(SIZE, "--model", RTN)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{path.name}*"])
    assert words in result.stderr.str()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "rnt"), "did you mean rtn"),
        (("--model", "rtn(bits=5)"), "allowed are 2, 3, 4, 8"),
        (("--model", RTN, "--base", "no-such-base"), "no such folder"),
        (("--model", "rtn"), "divisors near it: 24, 32, 48, 96"),
        (("--model", RTN, "--batch-size", "0"), "--batch-size 0"),
        (("--model", RTN, "--runs", "0"), "--runs 0"),
        (("--model", RTN, "--max-new-tokens", "1"), "at least 2"),
        (("--model", RTN, "--device", "tpu"), "allowed are auto, cpu, cuda"),
        (("--model", RTN, "--device", "cpu:0"), "allowed are auto, cpu, cuda"),
        (("--model", RTN, "--tdp", "-5"), "--tdp -5 is not allowed: watts above 0"),
        (("--model", RTN, "--tdp", "nan"), "--tdp nan is not allowed: watts above 0"),
        (("--model", RTN, "--journal", "/dev/null/journal.jsonl"), "cannot be written"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_before_anything_is_measured(run, pytester, arguments, words):
    result = run(SIZE, *arguments)
    assert result.ret in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED)
    assert words in result.stdout.str() + result.stderr.str()
    assert not (pytester.path / ".bench" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((SIZE, "--model", RTN), 0),
        ((SIZE, "--model", RTN, "--gate", "strict"), 1),
        ((FILES / "test_efficiency.py", "--model", "rnt"), 2),
        ((SIZE, "--model", RTN, "--base", "no-such-base"), 4),
        ((SIZE, "--model", RTN, "-k", "nothing"), 5),
    ],
    ids=["passed", "gate", "cannot be collected", "refused", "nothing to run"],
)
def test_the_exit_status_says_how_a_run_ended_as_readme_tells(run, arguments, status):
    told = re.findall(r"^\| (\d) \|", (FILES.parent / "README.md").read_text(), flags=re.MULTILINE)

    assert ["0", "1", "2", "3", "4", "5"] == told
    assert status == run(*arguments).ret


def test_data_that_is_not_there_is_said_before_anything_is_measured(run, tmp_path):
    result = run(QUALITY, "--model", RTN, "--data", tmp_path)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert str(tmp_path) in result.stderr.str()


def test_perplexity_of_a_foreign_checkpoint_on_a_folder_touches_nothing_of_the_reference(
    checkpoint, text_folder, tmp_path
):
    code = (
        "import sys, pytest\n"
        f"code = pytest.main([*{QUIETLY}, {QUALITY!r}, '--model', 'fp16', '--length', '32',"
        f" '--base', {str(checkpoint)!r}, '--data', {str(text_folder)!r}, '--rootdir', {str(tmp_path)!r}])\n"
        "assert code == 0, code\n"
        "assert not [name for name in sys.modules if name.startswith('bench.reference')]\n"
    )
    _python(code, cwd=tmp_path)


def test_collecting_imports_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys, pytest\n"
        f"code = pytest.main([*{QUIETLY}, '--collect-only', '--model', 'all', {str(FILES)!r},"
        f" '--rootdir', {str(tmp_path)!r}])\n"
        "assert code == 0, code\n"
        "assert not {'torch', 'transformers', 'hypothesis'} & set(sys.modules)\n"
    )
    assert "test_generation[nf4-b1-eager]" in _python(code, cwd=tmp_path).stdout


def test_each_recipe_is_compressed_once_and_its_measurements_follow_each_other(run):
    result = run(
        FILES / "test_efficiency.py", FILES / "test_quality.py", "--collect-only", "-q", "--model", f"fp16,{RTN}",
        "--tasks", "piqa,mmlu",
    )  # fmt: skip
    collected = [line for line in result.stdout.lines if "::test_" in line]
    changes = sum(("fp16" in a) != ("fp16" in b) for a, b in pairwise(collected))
    assert len(collected) == 20
    assert changes == 1


def test_speed_is_measured_beside_the_base_in_the_same_rounds(run, pytester):
    run(SPEED, "--model", RTN, "--batch-size", "1,2", *QUICK).assert_outcomes(passed=2)
    rows = [json.loads(line) for line in (pytester.path / ".bench" / "journal.jsonl").read_text().splitlines()]
    decode = [r for r in rows if r["kind"] == "row" and r["metric"] == "efficiency.decode_ms"]
    assert [r["params"]["batch"] for r in decode] == [1, 2]
    assert all(len(r["samples"]) == len(r["base_samples"]) == 2 for r in decode)
    assert rows[-1]["kind"] == "end"


def test_pytest_benchmark_keeps_and_compares_our_runs_and_history_reads_them(run, pytester):
    for _ in range(2):
        run(SPEED, "--model", f"fp16,{RTN}", "--benchmark-autosave", *QUICK).assert_outcomes(passed=2)

    compare = [sys.executable, "-m", "pytest_benchmark", "compare"]
    compared = subprocess.run(compare, cwd=pytester.path, capture_output=True, text=True, check=True).stdout

    assert compared.count("benchmark 'someones-llama on cpu-") == 1  # one table of all recipes under one load
    assert "generation[batch=1,mode=eager,new_tokens=4,prompt_tokens=8]': 4 tests" in compared
    for name in ("fp16", RTN):
        assert len(re.findall(rf"test_generation\[{re.escape(name)}-b1-eager\] \(000[12]_", compared)) == 2
    stored = of_storage(pytester.path / ".benchmarks")
    assert [("someones-llama", "fp16", 2), ("someones-llama", RTN, 2)] == [
        (each.base, each.recipe, len(each.points)) for each in stored
    ]
    assert all(0 < value < 60 for each in stored for value in each.values)


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

    result = run(SIZE, QUALITY, "--model", ",".join(["fp16", *STEPS, *orders]), *arguments)

    result.assert_outcomes(passed=12)
    shown = result.stdout.str()
    assert "Orders of kd(" in shown
    assert re.search(r"p\(.*: p\(.*\) [\d.]+ s, kd\(.*\) [\d.]+ s, rtn\(group_size=32\) [\d.]+ s", shown)
    assert "the best" in shown
    command(["report", "--journal", str(pytester.path / ".bench/journal.jsonl"), "--tables", "S4"])


def test_the_report_is_of_all_that_the_journal_holds(run, pytester, text_folder):
    """Two runs of one metric each: the report of the second has the values of both, and summary of the second."""
    run(SIZE, "--model", RTN).assert_outcomes(passed=1)
    result = run(QUALITY, "--model", RTN, "--data", text_folder, "--samples", "2", "--length", "32", "--report", "out")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["report: *tables.md"])
    rows = json.loads((pytester.path / "out/results.json").read_text())
    journal = read(pytester.path / ".bench/journal.jsonl").rows()
    assert {(row.key, row.value) for row in journal} == {(row["key"], row["value"]) for row in rows}
    tables = (pytester.path / "out/tables.md").read_text()
    assert "### Table E14" in tables
    assert "### Table E20" in tables
    assert f"run {journal[-1].run}" in (pytester.path / "out/summary.md").read_text()


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(run, pytester):
    (pytester.path / "out").write_text("in the way")
    result = run(SIZE, "--model", RTN, "--report", "out")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--report out: *choose another folder*"])
    assert not (pytester.path / ".bench").exists()


def test_of_the_first_steps_of_an_order_the_report_measures_size_and_perplexity_alone(run):
    shown = run(str(FILES), "--model", "report", "--collect-only", "-q").stdout.str()

    assert {"test_size", "test_perplexity"} == set(re.findall(r"::(\w+)\[p-kd\]", shown))
    assert {"test_answers", "test_generation", "test_average"} <= set(re.findall(r"::(\w+)\[[^]]*p-kd-nf4", shown))
    assert {"fp16", "nf4", "sparsegpt", "structured"} == set(re.findall(r"::test_recovery\[(.*)\]", shown))


def test_speed_is_measured_with_pytest_benchmark_switched_off(run):
    run(SPEED, "--model", RTN, "--benchmark-disable", *QUICK).assert_outcomes(passed=1)


def test_a_recipe_that_runs_out_of_memory_leaves_rows_that_say_so_and_the_rest_completes(run, pytester, monkeypatch):
    from compression.quantization.rtn import RTN as Method

    def explode(self, linear, context):
        raise MemoryError("no room")

    monkeypatch.setattr(Method, "compress_linear", explode)
    result = run(SIZE, "--model", f"{RTN},nf4(group_size=32)")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*out of memory*"])
    rows = [json.loads(line) for line in (pytester.path / ".bench" / "journal.jsonl").read_text().splitlines()]
    assert {r["status"] for r in rows if r["kind"] == "row" and r["recipe"] == RTN} == {"out_of_memory"}


def test_the_plan_is_printed_and_nothing_is_run(run, pytester):
    result = run(SIZE, "--model", f"fp16,{RTN}", "--plan")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*recipe*stored*memory at once*", "*fp16*", f"*{RTN.replace('[', '[[]')}*"])
    assert not (pytester.path / ".bench").exists()


def test_a_plan_for_a_truncated_checkpoint_says_that_it_is_damaged(run, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    result = run(SIZE, "--model", RTN, "--plan", "--base", broken)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"{weights} is damaged or not safetensors" in result.stderr.str()


def test_a_killed_run_goes_on_where_it_was(checkpoint, tmp_path):
    """Killed for good within the energy window, after the sizes are on the disk; --resume measures only the rest."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.plugin", "-p", "no:cacheprovider", SIZE, ENERGY,
               "--base", checkpoint, "--model", RTN, "--rootdir", tmp_path, *QUICK]  # fmt: skip
    journal = tmp_path / ".bench" / "journal.jsonl"
    child = subprocess.Popen(command, cwd=tmp_path, env=_environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journal.exists() and "efficiency.stored_bytes" in journal.read_text()):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    other = subprocess.run(
        [*command, "--resume", "--runs", "7"],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert other.returncode == pytest.ExitCode.USAGE_ERROR
    assert "had runs" in other.stdout + other.stderr
    subprocess.run([*command, "--resume"], cwd=tmp_path, env=_environment(), check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({r["run"] for r in records}) == 1
    assert sum(r.get("metric") == "efficiency.stored_bytes" for r in records) == 1
    assert sum(r.get("metric") == "efficiency.energy_mj_per_token" for r in records) == 1
    assert records[-1] == {**records[-1], "kind": "end", "status": "passed"}


def _environment():
    return {**os.environ, "PYTHONPATH": str(FILES.parent)}


def _python(code, cwd):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_what_became_of_each_layer_is_in_the_journal_once_for_each_recipe(run, pytester):
    run(SIZE, f"{FILES / 'test_efficiency.py'}::test_cost", "--model", f"fp16,{RTN}").assert_outcomes(passed=4)

    lines = (pytester.path / ".bench" / "journal.jsonl").read_text().splitlines()
    records = [each for each in map(json.loads, lines) if each["kind"] == "layers"]
    assert ["fp16", RTN] == [each["recipe"] for each in records]
    (deep,) = [each for each in records[1]["layers"] if each["name"] == "model.layers.1.mlp.down_proj"]
    assert 4 < deep["bits"] < 6
    assert 0 < deep["error"] < 0.2
