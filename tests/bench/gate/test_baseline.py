"""Baseline files: what is written is read again, what cannot be is refused, and recording merges."""

import json
import math
import os
from dataclasses import replace

import pytest
from healthy_results import (
    CONTEXT,
    FINGERPRINT,
    HEALTHY_METRICS,
    OTHER_MACHINE,
    healthy_row,
    healthy_rows,
    judged,
    metrics_and_rows,
    recorded,
    timed_row,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saboteurs import altered

from bench.errors import BaselineError
from bench.gate.baseline import ANYWHERE, Section
from bench.gate.verdicts import Baseline, slug, update


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=metrics_and_rows())
def test_a_baseline_comes_back_from_its_file_equal(tmp_path, case):
    metric, row = case
    baseline = recorded([row], metrics={metric.name: metric})
    expected = {ANYWHERE: Section(context={}, rows={})} | baseline.sections

    loaded = Baseline.load(baseline.save(tmp_path))

    assert replace(baseline, sections=expected) == loaded
    assert judged(row, loaded, mode="strict", metrics={metric.name: metric}).outcome == "pass"


def test_a_baseline_file_is_stable_and_can_be_read_by_people(tmp_path):
    rows = healthy_rows()
    path = recorded(rows).save(tmp_path)
    text = path.read_text()
    recorded(rows[::-1]).save(tmp_path)

    assert text == path.read_text()
    assert tmp_path / "reference" / "nf4.json" == path
    assert '"value": 15728640\n' in text
    assert max(len(line) for line in text.splitlines()) < 150
    assert ["items", "nf4.json"] == sorted(each.name for each in path.parent.iterdir())


def damaged(change) -> str:
    """The text of a sound baseline file after `change` of its table."""
    baseline = recorded([timed_row(), healthy_row("quality.perplexity", value=13.0)])
    table = {
        "schema": 2,
        "base": "reference",
        "recipe": "nf4",
        **baseline.sections[ANYWHERE].to_json(),
        "devices": {FINGERPRINT: baseline.sections[FINGERPRINT].to_json()},
    }
    change(table)
    return json.dumps(table)


def with_row(**facts):
    return damaged(lambda table: table["rows"]["quality.perplexity"].update(facts))


SOUND = damaged(lambda table: None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "it must be an object"),
        (SOUND[:-20], "baseline"),
        ("[" * 10**5, "nested too deeply"),
        (SOUND.replace('"schema": 2', '"schema": 3'), "schema=3 must be from 0 to 2"),
        (damaged(lambda table: table.pop("devices")), "lacks devices"),
        (damaged(lambda table: table.update(note="x")), "unknown note"),
        (damaged(lambda table: table["devices"].update({"": {"context": {}, "rows": {}}})), "by fingerprint"),
        (damaged(lambda table: table.update(rows=[])), "must be tables"),
        (damaged(lambda table: table["rows"]["quality.perplexity"].pop("unit")), "quality.perplexity: it lacks unit"),
        (damaged(lambda table: table["rows"].update({"quality.perplexity[k=1]": {}})), "lacks"),
        (with_row(value=math.nan), "NaN is not a finite number"),
        (SOUND.replace('"value": 13', '"value": 1e999'), "not finite"),
        (with_row(value=None), "quality.perplexity: it must be a number, not None"),
        (with_row(value=True), "not True \\(bool\\)"),
        (with_row(ratio="1"), "not '1' \\(str\\)"),
        (with_row(samples=[1.0, None]), "None"),
        (with_row(samples=1.0), "must be a list"),
        (with_row(better="up"), "better must be one of lower, higher, neither, not 'up'"),
        (with_row(kind="guess"), "kind must be one of .*, not 'guess'"),
        (with_row(status="failed"), "status must be one of .*, not 'failed'"),
        (with_row(params={"k": 1}), r"whose key is 'quality.perplexity\[k=1\]'"),
        (with_row(context={"weather": "fine"}), "unknown weather"),
        (with_row(context={"engine": "vllm"}), "engine must be a table of names and values, not 'vllm'"),
        (SOUND.replace('"base": "reference",', '"base": "reference", "base": "other",'), "'base' is there twice"),
    ],
)
def test_a_baseline_that_cannot_be_is_refused_by_file_and_row(tmp_path, text, words):
    path = tmp_path / "nf4.json"
    path.write_text(text)

    with pytest.raises(BaselineError, match=words) as caught:
        Baseline.load(path)
    assert str(path) in str(caught.value)


def test_a_row_that_is_in_the_file_twice_is_refused(tmp_path):
    path = tmp_path / "nf4.json"
    row = json.dumps(json.loads(SOUND)["rows"]["quality.perplexity"])
    path.write_text(SOUND.replace('"rows": {', f'"rows": {{"quality.perplexity": {row}, ', 1))

    with pytest.raises(BaselineError, match=r"'quality\.perplexity' is there twice"):
        Baseline.load(path)


def test_a_baseline_that_was_copied_to_another_name_is_refused(tmp_path):
    path = recorded([timed_row()]).save(tmp_path)
    os.rename(path, path.with_name("llm_int8.json"))

    assert Baseline.find(tmp_path, "reference", "nf4") is None
    with pytest.raises(BaselineError, match="is 'nf4' on 'reference', not 'llm_int8'"):
        Baseline.find(tmp_path, "reference", "llm_int8")


def test_a_folder_that_cannot_be_written_is_refused_and_an_unreadable_file_too(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(BaselineError, match="--baselines DIR"):
        recorded([timed_row()]).save(tmp_path / "file")
    with pytest.raises(BaselineError, match="cannot be read"):
        Baseline.load(tmp_path)


@settings(deadline=None)
@given(st.lists(st.text(max_size=100), unique=True, min_size=2, max_size=5))
def test_slugs_differ_where_texts_do_and_can_be_file_names(texts):
    slugs = [slug(text) for text in texts]

    assert len(texts) == len(set(slugs))
    assert all(slug(each) == each for each in slugs if len(each) <= 80)
    assert all(set(each) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for each in slugs)
    assert all(each[0] not in ".-_" and len(each) < 100 for each in slugs)


@pytest.mark.parametrize("text", ["nf4", "llm_int8", "p-kd-q", "qwen2.5-0.5b"])
def test_a_text_that_can_be_a_file_name_stays_as_it_is(text):
    assert text == slug(text)


# --- Recording -------------------------------------------------------------------------------------------------------


def recording(folder, rows, *, context=CONTEXT, fingerprint=FINGERPRINT):
    return update(folder, rows, context, fingerprint, metrics=HEALTHY_METRICS)


def found_in(folder) -> Baseline:
    return Baseline.find(folder, "reference", "nf4")


def test_what_was_recorded_is_passed_by_the_gate(tmp_path):
    recording(tmp_path, healthy_rows())

    assert all(judged(row, found_in(tmp_path), mode="strict").outcome == "pass" for row in healthy_rows())


def test_recording_says_what_is_new_and_what_changed(tmp_path):
    before = healthy_row(value=2.1, params={"batch": 1})

    assert recording(tmp_path, [before]) == ["nf4: efficiency.decode_ms[batch=1] new: 2.1 ms/token"]
    assert recording(tmp_path, [before]) == []
    assert recording(tmp_path, [replace(before, value=2.05)]) == [
        "nf4: efficiency.decode_ms[batch=1] better: 2.1 -> 2.05 ms/token (-2.38 %), within its tolerance"
    ]


def test_a_partial_run_is_merged_and_the_rest_is_kept(tmp_path):
    recording(tmp_path, healthy_rows())
    recording(tmp_path, [replace(timed_row(seed=5), device=OTHER_MACHINE)], fingerprint=OTHER_MACHINE)

    baseline = found_in(tmp_path)

    assert sorted(baseline.devices) == [OTHER_MACHINE, FINGERPRINT]
    assert len(healthy_rows()) + 1 == sum(len(section.rows) for section in baseline.sections.values())
    assert all(judged(row, baseline).outcome == "pass" for row in healthy_rows())


def test_a_row_that_is_kept_still_says_where_it_was_measured(tmp_path):
    perplexity = healthy_row("quality.perplexity", value=13.0)
    recording(tmp_path, [perplexity])
    other = healthy_row("efficiency.layers", value=56.0, device=OTHER_MACHINE)
    recording(tmp_path, [other], context=CONTEXT | {"torch": "2.14.0"}, fingerprint=OTHER_MACHINE)

    entry = found_in(tmp_path).sections[ANYWHERE].rows["quality.perplexity"]

    assert (entry.context["fingerprint"], entry.context["torch"]) == (FINGERPRINT, "2.13.0")
    assert judged(replace(perplexity, value=13.001), found_in(tmp_path)).outcome == "regressed"


def test_a_row_of_an_engine_says_which_and_how_it_computed_and_others_say_nothing(tmp_path):
    flags = {"dtype_of_weights": "torch.float16", "threads": 1}
    source = {"engine": "vllm", "version": "0.32.0", "torch": "2.13.0", "transformers": None, "flags": flags}
    perplexity = healthy_row("quality.perplexity", value=13.0)
    served = replace(perplexity, params={"runtime": "vllm"}, source=source)
    recording(tmp_path, [perplexity, served])

    rows = json.loads((tmp_path / "reference" / "nf4.json").read_text())["rows"]

    known = {"engine": "vllm", "version": "0.32.0", "torch": "2.13.0", "dtype_of_weights": "torch.float16"}
    assert {"engine": known} == rows[served.key]["context"] and "context" not in rows[perplexity.key]
    assert known == found_in(tmp_path).sections[ANYWHERE].rows[served.key].context["engine"]


def test_rows_of_another_checkpoint_are_dropped_aloud(tmp_path):
    recording(tmp_path, healthy_rows())

    words = recording(tmp_path, [healthy_row("efficiency.layers", value=8.0)], context=CONTEXT | {"base_hash": "b2"})

    assert words[0] == "nf4: 9 recorded rows dropped: base_hash was 'b1', is 'b2'"
    assert {ANYWHERE} == set(found_in(tmp_path).sections)


def test_rows_of_other_data_are_dropped_only_where_that_is_measured_again(tmp_path):
    recording(tmp_path, [healthy_row("quality.perplexity"), healthy_row("rag.f1", value=0.5, params={"k": 1})])

    other = healthy_row("rag.f1", value=0.6, params={"k": 5})
    words = recording(tmp_path, [other], context=CONTEXT | {"data_hash": "d2"})

    assert words[0] == "nf4: rag.f1[k=1] dropped: data_hash was 'd1', is 'd2'"
    assert {"quality.perplexity", "rag.f1[k=5]"} == set(found_in(tmp_path).sections[ANYWHERE].rows)


def test_a_metric_that_its_measurement_no_longer_yields_is_dropped_aloud(tmp_path):
    recording(tmp_path, healthy_rows())
    words = recording(tmp_path, [row for row in healthy_rows() if row.metric != "efficiency.layers"])

    assert words == ["nf4: efficiency.layers dropped: it is no longer measured"]


@pytest.mark.parametrize(
    "rows",
    [
        altered(
            healthy_rows(), "rag.f1", lambda row: replace(row, value=None, ratio=None, status="failed", reason="?")
        ),
        [*healthy_rows(), healthy_rows()[0]],
        altered(healthy_rows(), "rag.f1", lambda row: replace(row, better="lower")),
        altered(healthy_rows(), "rag.f1", lambda row: replace(row, device=OTHER_MACHINE)),
        altered(healthy_rows(), "rag.f1", lambda row: replace(row, metric="rag.f2")),
    ],
    ids=["failed", "twice", "swapped direction", "other device", "unknown metric"],
)
def test_rows_that_cannot_be_a_baseline_are_refused_and_nothing_is_written(tmp_path, rows):
    with pytest.raises(BaselineError, match="cannot be recorded"):
        recording(tmp_path, rows)
    assert list(tmp_path.iterdir()) == []


def test_the_default_metrics_are_those_that_are_declared(tmp_path):
    with pytest.raises(BaselineError, match=r"there is no metric 'efficiency\.never_declared'"):
        update(tmp_path, [replace(timed_row(), metric="efficiency.never_declared")], CONTEXT, FINGERPRINT)
