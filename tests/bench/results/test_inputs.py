"""What rows read: equal copies are compared, a changed text is said to have changed, and is no regression."""

from dataclasses import replace

import pytest
from healthy_results import CONTEXT, FINGERPRINT, HEALTHY_METRICS, healthy_row, judged, recorded
from hypothesis import given
from hypothesis import strategies as st

from bench.gate.baseline import ANYWHERE, Baseline
from bench.gate.input_changes import WORDS
from bench.gate.verdicts import update
from bench.results.row import Input, Row, keys_of

KINDS = ("calibration", "teacher", "downstream", "data", "judge", "encoder")
digests = st.text("0123456789abcdef", min_size=64, max_size=64)


def read(kind, digest, *, name="notes", value=2.0, **params):
    """A row of a recipe that read something of a folder."""
    given = Input(name, digest)
    own = keys_of({"batch": 1, kind: given}) | params
    return healthy_row("quality.perplexity", value=value, params=own, inputs={kind: given})


@given(st.sampled_from(KINDS), digests)
def test_an_equal_copy_elsewhere_is_compared(kind, digest):
    before = read(kind, digest)

    assert "pass" == judged(read(kind, digest, name="copy"), before).outcome
    assert "regressed" == judged(read(kind, digest, name="copy", value=3.0), before).outcome


@given(st.sampled_from(KINDS), digests, digests)
def test_a_changed_text_is_said_to_have_changed_and_is_no_regression(kind, then, now):
    verdict = judged(read(kind, "1" + now[1:], value=3.0), read(kind, "0" + then[1:]))

    assert ("not_comparable", True) == (verdict.outcome, verdict.fails)
    assert f"{WORDS[kind]} changed: notes had the digest 0{then[1:12]}, notes has 1{now[1:12]}" in verdict.words
    assert "record it again with `" in verdict.words


def test_what_a_base_brings_by_default_is_compared_by_its_content_though_no_key_has_it():
    plain = healthy_row("quality.perplexity")
    before, now = (replace(plain, inputs={"teacher": Input("reference-teacher", each * 64)}) for each in "ab")

    assert "pass" == judged(before, before).outcome
    assert "the teacher changed" in judged(replace(now, value=9.0), before).words
    assert "pass" == judged(now, plain).outcome  # recorded before inputs were: not compared


def test_another_text_beside_the_recorded_one_is_new():
    verdict = judged(read("calibration", "b" * 64, name="letters"), read("calibration", "a" * 64))

    assert ("new", False) == (verdict.outcome, verdict.fails)


def test_of_a_changed_text_other_parameters_are_other_rows():
    assert "new" == judged(read("calibration", "b" * 64, batch=4), read("calibration", "a" * 64)).outcome


def test_a_text_that_became_longer_has_other_counts():
    verdict = judged(read("data", "b" * 64, samples=9), read("data", "a" * 64, samples=8))

    assert "the data changed" in verdict.words


def test_data_of_a_task_that_changed_is_said_so():
    before, now = (healthy_row("quality.accuracy", value=0.5, params={"data": f"facts@{each * 8}"}) for each in "ab")

    assert "the data changed: facts had the digest aaaaaaaa, facts has bbbbbbbb" in judged(now, before).words


@given(st.dictionaries(st.sampled_from(KINDS), st.tuples(st.text(max_size=9), st.none() | digests)))
def test_inputs_are_kept_in_rows_and_baselines(tmp_path_factory, found):
    inputs = {kind: Input(*each) for kind, each in found.items()}
    row = healthy_row("quality.perplexity", params=keys_of(inputs), inputs=inputs)
    folder = tmp_path_factory.mktemp("baselines")

    update(folder, [row], CONTEXT, FINGERPRINT, metrics=HEALTHY_METRICS)

    assert inputs == Row.from_json(row.to_json()).inputs
    [entry] = Baseline.find(folder, row.base, row.recipe).sections[ANYWHERE].rows.values()
    assert inputs == entry.inputs and row.key in recorded([row]).sections[ANYWHERE].rows


def test_a_text_of_a_folder_goes_by_digest_in_baselines_that_are_migrated(tmp_path):
    import json

    from bench.gate.digest import digest_of, without_digest
    from bench.gate.migrations import migrated

    params = {"data": "notes", "length": 512}
    context = CONTEXT | {"data_hash": {"perplexity": "d" * 64}}
    update(tmp_path, [healthy_row("quality.perplexity", params=params)], context, FINGERPRINT, metrics=HEALTHY_METRICS)
    [path] = tmp_path.glob("*/*.json")
    table = without_digest(json.loads(path.read_text())) | {"schema": 1}
    path.write_text(json.dumps(table | {"digest": digest_of(table)}))

    [entry] = Baseline.load(path).sections[ANYWHERE].rows.values()

    assert ({"data": "d" * 12, "length": 512}, Input("notes", "d" * 64)) == (entry.params, entry.inputs["data"])
    _, renamed = migrated(table)
    assert {"quality.perplexity[data=notes,length=512]": f"quality.perplexity[data={'d' * 12},length=512]"} == renamed


@pytest.mark.parametrize("inputs", [{"teacher": "t"}, {"teacher": {"name": 1, "digest": None}}, ["teacher"]])
def test_inputs_that_cannot_be_are_refused(inputs):
    from bench.errors import JournalError

    with pytest.raises(JournalError, match=r"inputs?"):
        healthy_row(inputs=inputs)
