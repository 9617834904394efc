"""Runs on an engine: transformers, in a process of its own, on a tiny checkpoint that this package wrote."""

import math
import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import small_runs
from hypothesis import given
from hypothesis import strategies as st
from processes import completed

from bench import test_runtimes as served
from bench.commands.recommend import main as recommend
from bench.measure.engines.generation import EngineDecoder
from bench.measure.engines.likelihoods import diverge
from bench.report.tables import tables
from bench.results.records import matches
from bench.session.served import remove_orphans
from bench.session.session import Workbench

RTN, HQQ = "rtn(group_size=8,symmetric=true)", "hqq(group_size=8)"
ON = {"runtimes": ("native", "transformers"), "runtime_pythons": {"transformers": Path(sys.executable)}}
MEASUREMENTS = {
    "generation": partial(served.test_served_generation, runtime="transformers", batch_size=1),
    "memory": partial(served.test_served_memory, runtime="transformers", batch_size=1),
    "served perplexity": partial(served.test_served_perplexity, runtime="transformers"),
    "served divergence": partial(served.test_served_divergence, runtime="transformers"),
}
LOAD = {"batch_sizes": (1,), "runs": 2, "warmup": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    small_runs.make_base(root)
    found = small_runs.one_run(
        root, "fp16", RTN, HQQ, measurements=MEASUREMENTS | small_runs.MEASUREMENTS, **ON, **LOAD
    )
    found.root = root
    return found


def of(run, recipe, metric, runtime="transformers"):
    (row,) = [row for (name, _), row in run.rows.items()
              if (name, row.metric, row.runtime) == (recipe, metric, runtime)]  # fmt: skip
    return row


@pytest.mark.process
def test_rows_name_the_engine_and_what_it_is(run):
    assert [] == run.failing
    for metric in ("efficiency.decode_ms", "efficiency.peak_memory_mb", "quality.perplexity", "quality.kl_to_base"):
        row = of(run, RTN, metric)
        assert "transformers" == row.params["runtime"] == row.source["engine"]
        assert row.source["version"] and row.source["flags"]
        assert row.base_value is not None and (row.ratio or metric == "quality.kl_to_base")


@pytest.mark.process
@pytest.mark.parametrize("steps", ["fp16", RTN])
def test_the_perplexity_of_what_is_served_is_that_of_the_model_here(run, steps):
    own, theirs = (of(run, steps, "quality.perplexity", runtime) for runtime in ("native", "transformers"))

    assert own.value == pytest.approx(theirs.value, rel=1e-4)
    assert own.items.hashes == theirs.items.hashes
    assert own.items.values == pytest.approx(theirs.items.values, abs=1e-3)


@pytest.mark.process
def test_the_divergence_of_the_likeliest_tokens_is_at_most_that_of_all(run):
    own, theirs = (of(run, RTN, "quality.kl_to_base", runtime) for runtime in ("native", "transformers"))

    assert 0 < theirs.value <= own.value * (1 + 1e-3)
    assert "at least this much" in theirs.reason and theirs.params["top"] == 20
    same = of(run, RTN, "quality.top1_agreement").value
    assert same == pytest.approx(of(run, RTN, "quality.top1_agreement", "native").value, abs=0.02)


@pytest.mark.process
def test_what_an_engine_does_not_tell_is_not_available(run):
    assert "not_available" == of(run, RTN, "efficiency.kv_cache_mb").status
    assert "not_available" == of(run, RTN, "efficiency.prefill_ms").status
    assert of(run, RTN, "efficiency.ttft_ms").value > 0


@pytest.mark.process
def test_what_no_format_holds_for_the_engine_says_so(run):
    row = of(run, HQQ, "efficiency.decode_ms")

    assert "not_available" == row.status
    assert "no format holds this model for transformers" in row.reason and "real zero points" in row.reason
    assert of(run, HQQ, "quality.perplexity", "native").value > 0


@pytest.mark.process
def test_one_table_has_both_and_the_others_have_what_runs_here(run):
    made = {(table.number, table.family): table for table in tables(run.rows.values())}

    both = made["S5", "quantization"]
    assert {"fp16 (native)", "fp16 (transformers)", f"{RTN} (native)", f"{RTN} (transformers)"} <= {
        line.name for line in both.lines
    }
    at = both.columns.index("Perplexity")
    cells = {line.name: line.cells[at].value for line in both.lines}
    assert cells[f"{RTN} (native)"] == of(run, RTN, "quality.perplexity", "native").value
    assert cells[f"{RTN} (transformers)"] == of(run, RTN, "quality.perplexity").value
    alone = made["E20", "quantization"]
    assert [RTN, HQQ] == [line.name for line in alone.lines if line.name in (RTN, HQQ)]


@pytest.mark.process
def test_recommended_is_what_an_engine_served_by_its_figures(run, capsys):
    journal = run.root / "journal.jsonl"
    recommend(["--journal", str(journal), "--runtime", "transformers"])
    shown = capsys.readouterr().out

    assert "timings and memory are those of transformers on" in shown
    named = [line.split(" | ")[0].removeprefix("| ") for line in shown.splitlines() if line.startswith("| ")]
    assert RTN in named and HQQ not in named
    rtn = next(line for line in shown.splitlines() if line.startswith(f"| {RTN} "))
    assert 2 == rtn.count("not measured")  # accuracy and energy or cost; latency is known
    with pytest.raises(SystemExit, match="2"):
        recommend(["--journal", str(journal), "--runtime", "vllm"])
    assert "nothing was measured on it; measured on: native, transformers" in capsys.readouterr().err


@pytest.mark.process
def test_a_row_of_an_engine_is_no_answer_to_what_runs_here(run):
    own, theirs = (of(run, RTN, "quality.perplexity", runtime) for runtime in ("native", "transformers"))
    begun = {"of": "perplexity", "recipe": RTN, "params": {k: v for k, v in own.params.items() if k != "batch"}}

    assert matches(own, begun) and not matches(theirs, begun)
    asked = begun | {"params": begun["params"] | {"runtime": "transformers"}}
    assert matches(theirs, asked) and not matches(own, asked)


def test_what_another_process_left_is_removed_if_that_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = completed([sys.executable, "-c", "import os; print(os.getpid())"], check=True)
    for name in (f"bench-served-{ended.stdout.strip()}-a", f"bench-served-{os.getpid()}-b", "bench-served-c"):
        (tmp_path / name).mkdir()

    remove_orphans()

    assert {f"bench-served-{os.getpid()}-b", "bench-served-c"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.process
def test_the_log_of_the_engine_lies_beside_the_journal_and_its_checkpoints_are_gone(run):
    logs = sorted(path.name for path in run.root.glob("journal.transformers.*.log"))

    assert ["journal.transformers.fp16.log", f"journal.transformers.{_slug(RTN)}.log"] == logs


def _slug(text):
    from compression import Recipe

    return Recipe.parse(text).slug


@pytest.mark.process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, "out_of_memory"), (signal.SIGSEGV, "failed")])
def test_a_killed_engine_leaves_a_row_that_says_so_and_is_opened_again(tmp_path, monkeypatch, number, status):
    small_runs.make_base(tmp_path)
    workbench, run = Workbench(small_runs.options(tmp_path, RTN, **ON, **LOAD)), EngineDecoder.run

    def killed_in_its_second_round(decoder, index=0):
        if index == 1:
            os.kill(decoder.engine.pid, number)
        return run(decoder, index)

    monkeypatch.setattr(EngineDecoder, "run", killed_in_its_second_round)
    chosen = {name: MEASUREMENTS[name] for name in ("generation", "served perplexity")}
    failing = small_runs.measured(workbench, measurements=chosen)

    assert any(f"generation could not be measured ({status})" in words for words in failing)
    rows = {row.metric: row for row in workbench.rows.values()}
    assert status == rows["efficiency.decode_ms"].status
    for words in ("the process of transformers", number.name, "journal.transformers"):
        assert words in rows["efficiency.decode_ms"].reason
    assert rows["quality.perplexity"].value > 0


# --- The divergence of the likeliest tokens ---------------------------------------------------------------------------

logits = st.lists(st.floats(-8, 8), min_size=4, max_size=12)


def likeliest(values, top):
    whole = math.log(math.fsum(map(math.exp, values)))
    return sorted(((i, value - whole) for i, value in enumerate(values)), key=lambda pair: -pair[1])[:top]


@given(logits, st.data())
def test_it_is_at_most_the_whole_divergence_and_all_of_it_where_all_tokens_are_known(one, data):
    other = data.draw(st.lists(st.floats(-8, 8), min_size=len(one), max_size=len(one)))
    whole, known = (dict(likeliest(values, len(one))) for values in (one, other))
    exact = math.fsum(math.exp(p) * (p - known[token]) for token, p in whole.items())

    few = diverge(likeliest(one, 3), likeliest(other, 3))

    assert few.kl <= exact + 1e-9 and few.kl >= 0
    assert diverge(likeliest(one, len(one)), likeliest(other, len(one))).kl == pytest.approx(exact, abs=1e-6)
    assert few.tail == pytest.approx(1 - math.fsum(math.exp(p) for token, p in likeliest(one, 3)
                                                   if token in dict(likeliest(other, 3))), abs=1e-9)  # fmt: skip


@given(logits)
def test_a_distribution_does_not_differ_from_itself(values):
    found = diverge(likeliest(values, 3), likeliest(values, 3))

    assert found.kl == pytest.approx(0, abs=1e-12) and found.agreed
