"""The dtype that quality is computed in: fp32 for bases in 16 bits on processors without bf16, and rows that say so."""

import gc
import json
import weakref
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from commands import FILES, pytest_bench
from small_runs import MEASUREMENTS, make_base, measured, one_run, options
from torch.nn.modules.module import register_module_forward_pre_hook

from bench import test_efficiency as efficiency
from bench import test_quality, test_recovery
from bench.measure.perplexity import perplexity
from bench.results.journal import read
from bench.session import compute
from bench.session.session import Workbench
from compression.layers.kernels import torch_products

pytest_plugins = ["pytester"]

RECIPE = "rtn(group_size=32)"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of equal checkpoints, by the dtype that they are stored in."""
    folders = {dtype: tmp_path_factory.mktemp("base") for dtype in (torch.bfloat16, torch.float32)}
    for dtype, folder in folders.items():
        make_base(folder, dtype=dtype)
    return folders


@pytest.fixture
def without_bf16(monkeypatch):
    monkeypatch.setattr(torch_products, "has_bf16_cpu", lambda: False)


def run(folder, tmp_path, *recipes, **given):
    """A run on the base of a folder, with a journal and baselines of its own."""
    given = {"journal": tmp_path / "journal.jsonl", "baselines": tmp_path / "baselines"} | given
    return one_run(folder, *recipes or ("fp16", RECIPE), **given)


def dtypes(found):
    return {row.of: row.compute_dtype for row in found.rows.values()}


def dtypes_of_models(monkeypatch):
    """The dtypes of the models whose perplexity is measured, from now on."""
    seen = []

    def spy(model, *arguments, base=None, **named):
        seen.extend(each.dtype for each in (model, base) if each is not None)
        return perplexity(model, *arguments, base=base, **named)

    monkeypatch.setattr(test_quality, "perplexity", spy)
    return seen


def test_without_bf16_instructions_quality_is_computed_in_float32_and_its_rows_say_so(
    bases, tmp_path, without_bf16, monkeypatch
):
    seen = dtypes_of_models(monkeypatch)

    found = run(bases[torch.bfloat16], tmp_path)

    assert {"artefact": None, "perplexity": "float32", "divergence": "float32"} == dtypes(found)
    assert {torch.float32} == set(seen)
    rows = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert {"perplexity", "divergence"} == {row["of"] for row in rows if row.get("compute_dtype") == "float32"}


@pytest.mark.parametrize(
    ("stored", "hardware", "choice", "dtype"),
    [
        (torch.bfloat16, True, "auto", None),
        (torch.bfloat16, False, "stored", None),
        (torch.bfloat16, True, "float32", "float32"),
        (torch.float32, False, "auto", None),
        (torch.float32, True, "float32", None),
    ],
)
def test_the_dtype_follows_base_processor_and_choice(bases, tmp_path, monkeypatch, stored, hardware, choice, dtype):
    monkeypatch.setattr(torch_products, "has_bf16_cpu", lambda: hardware)
    seen = dtypes_of_models(monkeypatch)

    found = run(bases[stored], tmp_path, RECIPE, compute_dtype=choice)

    assert {"artefact": None, "perplexity": dtype, "divergence": dtype} == dtypes(found)
    assert {torch.float32 if dtype else stored} == set(seen)


def test_float32_gives_the_numbers_of_the_same_weights_stored_in_float32(bases, tmp_path, without_bf16):
    narrow = run(bases[torch.bfloat16], tmp_path / "one", "fp16")
    rows = {row.metric: row.value for row in narrow.rows.values()}
    workbench = Workbench(options(bases[torch.bfloat16], "fp16", journal=tmp_path / "two.jsonl"))
    protocol, _ = test_quality._protocol(workbench)

    base = workbench.base
    wide = perplexity(base.model.float(), base.tokenizer, workbench.data, protocol, device="cpu")

    workbench.close()
    assert wide.perplexity == rows["quality.perplexity"]


def test_a_baseline_of_the_stored_dtype_is_compared_with_the_stated_tolerance(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_products, "has_bf16_cpu", lambda: True)
    only = {"perplexity": MEASUREMENTS["perplexity"]}
    assert [] == run(bases[torch.bfloat16], tmp_path, update=True, measurements=only).failing
    monkeypatch.setattr(torch_products, "has_bf16_cpu", lambda: False)
    workbench = Workbench(
        options(bases[torch.bfloat16], "fp16", RECIPE, journal=tmp_path / "two.jsonl", baselines=tmp_path / "baselines")
    )

    assert [] == measured(workbench, measurements=only)

    compared = [each for (_, key), each in workbench.verdicts.items() if key.startswith("quality.perplexity")]
    assert ["pass", "pass"] == [each.outcome for each in compared]
    assert all("computed in float32, the baseline in the stored dtype: tolerance 0.5 %" in e.words for e in compared)


def test_without_the_memory_for_copies_models_compute_as_stored_and_rows_say_why(
    bases, tmp_path, without_bf16, monkeypatch
):
    monkeypatch.setattr(compute.machine, "memory_free", lambda _: 1000)

    found = run(bases[torch.bfloat16], tmp_path)

    assert {None} == set(dtypes(found).values())
    reasons = {row.of: row.reason for row in found.rows.values()}
    assert reasons["artefact"] is None
    for of in ("perplexity", "divergence"):
        assert "computed in bfloat16, which is slow on this processor" in reasons[of]
        assert "--compute-dtype float32" in reasons[of]


def test_a_choice_of_float32_does_not_ask_for_memory(bases, tmp_path, without_bf16, monkeypatch):
    monkeypatch.setattr(compute.machine, "memory_free", lambda _: 1000)

    found = run(bases[torch.bfloat16], tmp_path, compute_dtype="float32")

    assert "float32" == dtypes(found)["perplexity"]


def test_copies_are_gone_before_the_next_recipe_and_before_time_or_memory_is_measured(bases, tmp_path, without_bf16):
    copies, alive = [], {}

    class Watched(Workbench):
        def compute_model(self, model):
            found = super().compute_model(model)
            if all(each() is not found for each in copies):
                copies.append(weakref.ref(found))
            return found

        def _begin(self, of, recipe, params):
            gc.collect()
            alive[recipe.text, of] = sum(each() is not None for each in copies)
            super()._begin(of, recipe, params)

    order = {"perplexity": MEASUREMENTS["perplexity"], "divergence": MEASUREMENTS["divergence"],
             "artefact": efficiency.test_size, "cost": efficiency.test_cost}  # fmt: skip
    workbench = Watched(
        options(bases[torch.bfloat16], RECIPE, "rtn(bits=3,group_size=32)", journal=tmp_path / "journal.jsonl")
    )

    assert [] == measured(workbench, measurements=order)

    counts = list(alive.values())
    assert [0, 2, 0, 0] * 2 == counts, alive
    gc.collect()
    assert [None] * len(copies) == [each() for each in copies]


def test_the_base_is_still_read_once_for_all_recipes(bases, tmp_path, without_bf16, monkeypatch):
    passes = []

    def count(model, ids, mask):
        passes.append(model)
        return hidden(model, ids, mask)

    hidden = perplexity.__globals__["_hidden"]
    monkeypatch.setitem(perplexity.__globals__, "_hidden", count)

    run(bases[torch.bfloat16], tmp_path, RECIPE, "rtn(bits=3,group_size=32)")

    batches = len(passes) // 3
    assert len(passes) == 3 * batches  # the base's, and each recipe's
    assert len({id(model) for model in passes}) == 3


ASKED = ("--model", "fp16", "--samples", "2", "--length", "64", "--tasks", "hellaswag", "--limit", "2", "--runs", "1",
         "--num-questions", "2", "--rag-seeds", "1", "--judge-new-tokens", "4", "--warmup-runs", "0",
         "--prompt-tokens", "8", "--max-new-tokens", "4", "--gate", "off")  # fmt: skip
LEFT_OUT = ("memory", "energy", "cost", "against", "start", "middle", "end")
STORED = {"artefact", "generation", "rag_speed", "no_rag_speed", "rag_context", "rag_ranking"}
COMPUTED = {"perplexity", "task", "tasks", "rag_answers", "rag_comparison", "rag_spread", "rag_distracted",
            "rag_unanswerable", "clarity", "likelihood"}  # fmt: skip


@pytest.mark.process
def test_every_measurement_of_quality_uses_float32_and_every_one_of_time_the_stored_dtype(
    imported, pytester, without_bf16, monkeypatch
):
    """The dtypes of the base itself, by kind of measurement, and those that the rows claim."""
    kinds, used = [], defaultdict(set)

    def begin(self, of, recipe, params):
        kinds.append(of)
        unpatched(self, of, recipe, params)

    def note(module, arguments):
        if type(module).__name__ == "MistralModel" and module.config.num_hidden_layers == 8:
            used[kinds[-1]].add(module.dtype)

    unpatched = Workbench._begin
    monkeypatch.setattr(Workbench, "_begin", begin)
    hook = register_module_forward_pre_hook(note)
    try:
        files = [FILES / f"test_{name}.py" for name in ("efficiency", "quality", "rag", "judge")]
        pytest_bench(pytester, *files, *ASKED, "-k", " and ".join(f"not {each}" for each in LEFT_OUT))
    finally:
        hook.remove()

    rows = read(pytester.path / ".bench" / "journal.jsonl").rows()
    claimed = {of: {row.compute_dtype for row in rows if row.of == of and row.value is not None} for of in set(kinds)}
    assert all(claimed[of] == {"float32"} for of in COMPUTED), claimed
    assert all(claimed[of] <= {None} for of in STORED), claimed
    for of, seen in used.items():
        assert {torch.float32 if of in COMPUTED else torch.bfloat16} == seen, of
    assert {"perplexity", "task", "rag_answers", "clarity", "generation", "rag_speed"} <= used.keys()


def test_recovery_is_scored_by_the_compute_models(monkeypatch):
    scored = []
    monkeypatch.setattr(test_recovery.recovery, "points", lambda model, *_: scored.append(model))
    workbench = SimpleNamespace(
        base_reading=lambda key, take: take(), compressed=lambda recipe: recipe, compute_model=lambda each: [each],
        base=SimpleNamespace(tokenizer=None), downstream="arithmetic",
    )  # fmt: skip

    test_recovery._points(workbench, "recipe")

    assert [["recipe"]] == scored
