"""Tolerances that were measured on a device: how they are kept, what is refused, and that the gate holds to them."""

import pytest
from checkpoints import says
from healthy_results import FINGERPRINT, HEALTHY_METRICS, judged, timed_row
from hypothesis import given
from hypothesis import strategies as st

from bench.commands import baselines, sign
from bench.errors import BaselineError
from bench.gate import digest, tolerances
from bench.metrics import all_metrics

DECODE = "efficiency.decode_ms"
HERE = "cpu-here-1t"


@pytest.fixture
def recorded(tmp_path):
    return tolerances.record(tmp_path, HERE, {DECODE: 0.012}, {"reruns": 40})


def test_what_is_recorded_is_read_again_device_by_device(tmp_path, recorded):
    tolerances.record(tmp_path, "gpu", {DECODE: 0.01, "efficiency.ttft_ms": 0.02}, {"reruns": 20})
    tolerances.record(tmp_path, HERE, {DECODE: 0.02}, {"reruns": 60})

    found = tolerances.read(tmp_path)

    assert {HERE: {DECODE: 0.02}, "gpu": {DECODE: 0.01, "efficiency.ttft_ms": 0.02}} == {
        device: facts["rel"] for device, facts in found.items()
    }
    assert 60 == found[HERE]["context"]["reruns"]


def test_only_the_metrics_of_that_device_are_held_to_them(tmp_path, recorded):
    metrics = all_metrics()

    here, there = (tolerances.held(metrics, tmp_path, device) for device in (HERE, "another"))

    assert 0.012 == here[DECODE].rel
    assert {DECODE} == {name for name in metrics if here[name] != metrics[name]}
    assert there == metrics == tolerances.held(metrics, tmp_path / "nothing", HERE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ('{"schema": 2, "devices": {}}', "schema must be 1, not 2"),
        ('{"schema": 1, "devices": []}', "devices must be a table"),
        ('{"schema": 1, "devices": {"a": {"context": {}}}}', "lacks rel"),
        (
            '{"schema": 1, "devices": {"a": {"context": {}, "rel": {"m": 0.5}}}}',
            "must be above 0 and at most 0.25, not 0.5",
        ),
        ('{"schema": 1, "devices": {"a": {"context": {}, "rel": {"m": NaN}}}}', "NaN is not a finite number"),
        ('{"schema": 1, "devices": {"a": {"context": {}, "rel": {"m": "1"}}}}', "must be a number"),
        ('{"schema": 1, "devices": {"a": {"context": {}, "rel": {"m": 0.02}}}}', "it has no digest"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path, text, words):
    (tmp_path / tolerances.NAME).write_text(text, encoding="utf-8")

    with pytest.raises(BaselineError, match=says(tolerances.NAME, words.replace("'", ""))):
        tolerances.held(all_metrics(), tmp_path, HERE)


@given(st.integers(0, 10_000), st.sampled_from("0123456789"))
def test_no_digit_can_be_changed_unseen(tmp_path_factory, place, digit):
    folder = tmp_path_factory.mktemp("one")
    path = tolerances.record(folder, HERE, {DECODE: 0.012}, {"reruns": 40})
    text = path.read_text(encoding="utf-8")
    digits = [at for at, each in enumerate(text) if each.isdigit() and each != digit]
    at = digits[place % len(digits)]
    path.write_text(text[:at] + digit + text[at + 1 :], encoding="utf-8")

    with pytest.raises(BaselineError, match=says(tolerances.NAME)):
        tolerances.read(folder)


def test_they_are_listed_with_the_baselines_and_a_damaged_file_is_not_passed_over(tmp_path, recorded, capsys):
    baselines.main(["list", "--baselines", str(tmp_path)])
    assert f"tolerances of {HERE}, calibrated in 40 reruns: decode_ms 1.2 %" in capsys.readouterr().out

    recorded.write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit):
        baselines.main(["list", "--baselines", str(tmp_path)])
    assert "it lacks devices" in capsys.readouterr().err


def test_a_change_by_hand_is_signed(tmp_path, recorded):
    recorded.write_text(recorded.read_text(encoding="utf-8").replace("0.012", "0.02"), encoding="utf-8")

    sign.main([str(recorded)])

    assert {DECODE: 0.02} == tolerances.read(tmp_path)[HERE]["rel"]


def test_what_is_beyond_a_quarter_cannot_be_signed(recorded):
    text = recorded.read_text(encoding="utf-8").replace("0.012", "0.3")
    recorded.write_text(text, encoding="utf-8")

    with pytest.raises(BaselineError, match=says("must be above 0 and at most 0.25, not 0.3")):
        digest.sign(recorded)
    assert text == recorded.read_text(encoding="utf-8")


def test_a_machine_that_is_too_noisy_gets_none_and_keeps_what_it_had(tmp_path, recorded):
    with pytest.raises(BaselineError, match=says("efficiency.ttft_ms 31 %", "taskset", "nothing was written")):
        tolerances.record(tmp_path, HERE, {DECODE: 0.02, "efficiency.ttft_ms": 0.31}, {})
    assert {DECODE: 0.012} == tolerances.read(tmp_path)[HERE]["rel"]


def test_the_gate_finds_on_a_calibrated_device_what_the_metrics_own_tolerance_lets_pass(tmp_path):
    tolerances.record(tmp_path, FINGERPRINT, {DECODE: 0.012}, {"reruns": 40})
    then, now = timed_row(noise=0.004), timed_row(noise=0.004, own=2.1 * 1.05, seed=1)

    calibrated = tolerances.held(HEALTHY_METRICS, tmp_path, FINGERPRINT)

    assert "pass" == judged(now, then).outcome
    assert "regressed" == judged(now, then, metrics=calibrated).outcome
    assert "pass" == judged(then, then, metrics=calibrated).outcome
