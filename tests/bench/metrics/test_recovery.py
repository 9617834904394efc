"""Measuring recovery: the share of the gap, which recipes are compared, and a run on a checkpoint."""

import pytest
import torch
from checkpoints import says, transformers_model
from hypothesis import given
from hypothesis import strategies as st

import bench.test_recovery
import compression
from bench.errors import NotAvailable, OptionError
from bench.metrics import recovery
from bench.metrics.recovery import RecoveryReading, ShareReading, check_task, recipes_of
from bench.results.items import Items, hashes_of
from bench.session.options import Options
from bench.session.session import Workbench
from compression import Recipe, locate

RIGHT = st.lists(st.tuples(*[st.sampled_from([0.0, 1.0])] * 3), min_size=1, max_size=30)


def items(values, kind="binary"):
    return Items(hashes_of(range(len(values))), tuple(values), kind)


def share_of(before, after, control):
    parts = {"before": before, "after": after, "control": control}
    return recovery.share(ShareReading(task="t", **{name: items(values) for name, values in parts.items()}))


@given(RIGHT)
def test_the_share_is_1_at_the_control_0_where_nothing_came_back_and_straight_between(rows):
    before, after, control = zip(*rows, strict=True)
    if sum(control) <= sum(before):
        with pytest.raises(NotAvailable, match="no gap to close: the model scores"):
            share_of(before, after, control)
        return

    assert 1 == share_of(before, control, control)
    assert 0 == share_of(before, before, control)
    gap = (sum(control) - sum(before)) / len(rows)
    assert share_of(before, after, control) == pytest.approx((sum(after) - sum(before)) / len(rows) / gap)


@given(RIGHT)
def test_the_gain_is_the_difference_of_the_scores_and_its_interval_holds_it(rows):
    before, after, _ = zip(*rows, strict=True)
    reading = RecoveryReading(task="t", before=items(before), after=items(after))

    assert recovery.gain(reading) == pytest.approx(recovery.score_after(reading) - recovery.score_before(reading))
    assert recovery.gain_low(reading) < recovery.gain(reading) + 1e-9
    assert {"recovery.score_before": items(before), "recovery.score_after": items(after)} == reading.items


def test_more_items_that_agree_make_the_interval_narrower():
    few, many = (RecoveryReading(task="t", before=items([0, 1] * n), after=items([1, 1] * n)) for n in (10, 200))

    assert recovery.gain(few) == recovery.gain(many) == 0.5
    assert 0 < recovery.gain_low(few) < recovery.gain_low(many)


@pytest.mark.parametrize(
    ("text", "compared"),
    [
        ("fp16", ("fp16", "recover", "recover")),
        ("nf4", ("nf4", "nf4-recover", "recover")),
        ("nf4-recover(rank=4)", ("nf4", "nf4-recover(rank=4)", "recover(rank=4)")),
        ("sparsegpt-nf4", ("sparsegpt-nf4", "sparsegpt-nf4-recover", "recover")),
        ("recover-nf4", ("recover-nf4", "recover-nf4-recover", "recover")),
    ],
)
def test_before_after_and_control(text, compared):
    assert compared == tuple(recipe.text for recipe in recipes_of(Recipe.parse(text)))


def test_a_task_that_is_not_scored_is_refused_with_those_that_are(tmp_path):
    assert "arithmetic" == check_task(None, locate("reference"))
    assert "rag" == check_task("rag", locate("random:tinyllama-1.1b"))
    for task, base in (("perplexity", "reference"), (str(tmp_path), "reference"), (None, "random:tinyllama-1.1b")):
        with pytest.raises(OptionError, match=says("--downstream", task or "was not given", "arithmetic")):
            check_task(task, locate(base))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has learnt nothing, with the reference's vocabulary."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    source = locate("reference")
    sizes = {"vocab_size": source.config["vocab_size"], "max_position_embeddings": 512, "hidden_size": 64}
    transformers_model("LlamaForCausalLM", dtype=torch.bfloat16, **sizes).save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.process
def test_a_run_measures_before_and_after_item_by_item_and_the_share_of_the_gap(checkpoint, tmp_path):
    recipe = Recipe.parse("nf4-recover(rank=4,samples=100,sequence_length=64,learning_rate=0.02,warmup=0)")
    options = Options(
        base=checkpoint, recipes=(recipe,), derived=recipes_of(recipe), downstream="facts_easy", gate="off",
        cache=tmp_path / "cache", journal=tmp_path / "journal.jsonl", baselines=tmp_path / "baselines",
        compute_dtype="stored",
    )  # fmt: skip
    run = Workbench(options)
    try:
        bench.test_recovery.test_recovery(run, recipe)
        bench.test_recovery.test_recovered_share(run, recipe)
    finally:
        run.close()
    rows = {row.metric.removeprefix("recovery."): row for row in run.rows.values() if row.of != "artefact"}
    base = compression.open_base(checkpoint)
    before, after, control = (
        recovery.points(
            compression.compress(base, each, downstream="facts_easy", cache=options.cache).model,
            base.tokenizer, "facts_easy",
        )
        for each in recipes_of(recipe)
    )  # fmt: skip

    assert {"score_before", "score_after", "gain", "gain_low", "share"} == rows.keys()
    assert (before, after) == (rows["score_before"].items, rows["score_after"].items)
    assert before != after and before.asked == after.asked == control.asked
    assert [before.mean, after.mean] == [rows[name].value for name in ("score_before", "score_after")]
    assert rows["gain"].value == pytest.approx(after.mean - before.mean)
    if control.mean > before.mean:
        wanted = (after.mean - before.mean) / (control.mean - before.mean)
        assert ("ok", pytest.approx(wanted)) == (rows["share"].status, rows["share"].value)
    else:
        assert ("not_available", None) == (rows["share"].status, rows["share"].value)
        assert "no gap to close" in rows["share"].reason
    for row in rows.values():
        assert ("facts_easy", recipe.text) == (row.inputs["downstream"].name, row.recipe)
        assert row.inputs["downstream"].key == row.params["downstream"]
