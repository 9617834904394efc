"""Recipes that an engine quantizes while it loads the model: what the engine is told, and what has no row."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import small_runs
from checkpoints import says

from bench import test_runtimes as served
from bench.errors import NotAvailable, OptionError
from bench.measure.engines import processes
from bench.measure.engines.engine import Engine, Options
from bench.measure.engines.environments import ENGINES, Requirement
from bench.session.plan import plan
from bench.session.session import Workbench
from compression import Recipe, RecipeError

FP8, PRUNED, FIRST_USE = "vllm(type=fp8_per_channel)", "magnitude-vllm(type=mxfp4)", "vllm(type=mxfp8)"
ENGINE = f"""
import sys, time
sys.path.insert(0, {processes.__path__[0]!r})
from serving import serve
class Model:
    def __init__(self, loss):
        self.loss = loss
    def logprobs(self, prompts, top):
        for prompt in prompts:
            yield prompt, [-self.loss] * (len(prompt) - 1), [[[i, -3.0 - i] for i in range(top)]] * (len(prompt) - 1)
    def generate(self, prompts, new_tokens, stop_ids, sampling):
        if self.loss == 3.0:
            raise RuntimeError("no kernel image is available")
        for number in range(len(prompts)):
            yield from ((number, 7, time.perf_counter()) for _ in range(new_tokens))
def opened(model, quantization=None, **fields):
    print(model.rpartition("/")[2], quantization, file=sys.stderr)
    loss = {{None: 2.0, "fp8_per_channel": 2.5, "mxfp8": 3.0}}.get(quantization)
    if loss is None:
        raise ValueError(f"no kernel for {{quantization}}")
    flags = {{"quantization": quantization}}
    return Model(loss), {{"engine": "vllm", "version": "1", "torch": None, "transformers": None, "vocabulary": 300,
                          "flags": flags}}
serve(opened)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("on-load")
    (root / "engine.py").write_text(ENGINE)
    small_runs.make_base(root)
    need = Requirement(module="json", install=(), variable="NONE", script=str(root / "engine.py"), quantizes=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "vllm", need)
        measurements = {"served perplexity": partial(served.test_served_perplexity, runtime="vllm")}
        found = small_runs.one_run(
            root, "fp16", FP8, PRUNED, FIRST_USE, measurements=measurements | small_runs.MEASUREMENTS,
            runtimes=("native", "vllm"), runtime_pythons={"vllm": Path(sys.executable)},
        )  # fmt: skip
    found.root = root
    return found


def of(run, recipe, metric, runtime):
    return [row for (name, _), row in run.rows.items()
            if (name, row.metric, row.runtime) == (recipe, metric, runtime)]  # fmt: skip


def test_the_engine_is_told_and_its_figures_stand_beside_those_of_the_base(run):
    [row] = of(run, FP8, "quality.nll", "vllm")

    assert [] == run.failing
    assert (2.5, 2.0) == (row.value, row.base_value)
    assert "fp8_per_channel" == row.source["flags"]["quantization"] == row.engine["quantization"]
    assert "fp16-own fp8_per_channel" in (run.root / f"journal.vllm.{Recipe.parse(FP8).slug}.log").read_text()


def test_what_the_engine_refuses_is_not_available_in_its_words_and_the_steps_before_were_exported(run):
    [row] = of(run, PRUNED, "quality.nll", "vllm")

    assert "not_available" == row.status and "no kernel for mxfp4" in row.reason
    assert "magnitude-own mxfp4" in (run.root / f"journal.vllm.{Recipe.parse(PRUNED).slug}.log").read_text()


def test_what_opens_and_fails_in_its_first_kernel_is_not_available_in_its_words(run):
    [row] = of(run, FIRST_USE, "quality.nll", "vllm")

    assert "not_available" == row.status
    assert "vllm opens vllm(type=mxfp8), but cannot compute with it" in row.reason
    assert "RuntimeError: no kernel image is available" in row.reason


@pytest.mark.parametrize("text", [FP8, PRUNED])
@pytest.mark.parametrize("metric", ["quality.perplexity", "quality.kl_to_base", "efficiency.stored_bytes"])
def test_nothing_is_measured_of_it_here(run, text, metric):
    [row] = of(run, text, metric, "native")

    assert ("not_available", None) == (row.status, row.value)
    assert f"{Recipe.parse(text).on_load} is what vllm makes" in row.reason and "--runtime vllm" in row.reason


@pytest.fixture
def workbench(tmp_path):
    small_runs.make_base(tmp_path)
    return partial(small_runs.options, tmp_path, runtimes=("vllm", "transformers"),
                   runtime_pythons={"vllm": Path(sys.executable), "transformers": Path(sys.executable)})  # fmt: skip


def test_another_engine_does_not_take_it_and_neither_are_stored_layers_taken(workbench):
    opened = Workbench(workbench(FP8, "rtn(group_size=8)-vllm"))

    with pytest.raises(NotAvailable, match="what vllm makes"):
        opened.served.engine("transformers", Recipe.parse(FP8))
    with pytest.raises(NotAvailable, match=says("vllm takes dense layers", "rtn(group_size=8) leaves some")):
        opened.served.engine("vllm", Recipe.parse("rtn(group_size=8)-vllm"))
    opened.close()


def test_what_cannot_be_is_refused_before_anything_is_measured(workbench):
    for text in ("vllm-rtn(group_size=8)", "rtn(group_size=7)-vllm"):
        with pytest.raises((RecipeError, ValueError), match=r"last step|group"):
            Workbench(workbench(text))


def test_a_plan_has_what_is_exported_and_says_who_does_the_rest(workbench):
    text = plan(workbench("fp16", PRUNED), [])

    assert "magnitude" in text and f"{PRUNED}: not available: vllm(type=mxfp4) is what vllm makes" in text


def test_an_engine_that_quantizes_nothing_is_not_told_to(tmp_path):
    with pytest.raises(OptionError, match="quantization must be None for transformers, not 'fp8'"):
        Engine.start("transformers", tmp_path, log=tmp_path / "log", python=sys.executable,
                     options=Options(quantization="fp8"))  # fmt: skip


def test_the_journal_holds_what_the_engine_was_told(run):
    lines = [json.loads(line) for line in (run.root / "journal.jsonl").read_text().splitlines()]
    told = {line["recipe"]: line["source"]["flags"] for line in lines
            if line["kind"] == "row" and line["metric"] == "quality.nll" and line["source"]}  # fmt: skip

    assert {"fp16": {"quantization": None}, FP8: {"quantization": "fp8_per_channel"}} == told
