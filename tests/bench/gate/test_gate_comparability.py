"""What the gate compares with what: other data, machines and definitions, and what is new, missing or not available."""

from dataclasses import replace

import pytest
from healthy_results import (
    CONTEXT,
    FINGERPRINT,
    HEALTHY_METRICS,
    LOSSES,
    OTHER_MACHINE,
    gated,
    healthy_row,
    healthy_rows,
    item_row,
    judged,
    recorded,
    timed_row,
)

from bench.gate import verdicts
from bench.gate.baseline import ANYWHERE, Section
from bench.gate.verdicts import judge, missing
from bench.metrics import all_metrics


@pytest.mark.parametrize("name", ["base_hash", "data_hash"])
def test_a_changed_checkpoint_or_changed_data_fails_and_says_what_changed(name):
    found = gated(healthy_rows(), healthy_rows(), context=CONTEXT | {name: "other"})

    assert all(each.fails and each.outcome == "not_comparable" for each in found)
    assert "was 'd1'" in found[0].words or "was 'b1'" in found[0].words
    assert "is 'other'" in found[0].words


@pytest.mark.parametrize(
    ("torch", "machine", "factor", "outcome"),
    [
        ("2.13.0", FINGERPRINT, 1 + 1e-12, "pass"),
        ("2.13.0", FINGERPRINT, 1.0001, "regressed"),
        ("2.13.0", FINGERPRINT, 0.9999, "improved"),
        ("2.14.0", FINGERPRINT, 1.0001, "pass"),
        ("2.13.0", OTHER_MACHINE, 1.0001, "pass"),
        ("2.13.0", OTHER_MACHINE, 1.002, "regressed"),
    ],
)
def test_a_deterministic_number_is_exact_on_one_device_and_torch_and_to_a_thousandth_elsewhere(
    torch, machine, factor, outcome
):
    before = healthy_row("quality.perplexity", value=13.0)
    now = replace(before, value=13.0 * factor, device=machine)

    assert outcome == judged(now, before, context=CONTEXT | {"torch": torch}).outcome


def test_a_timing_of_another_device_is_not_compared_and_both_devices_are_named():
    now = replace(timed_row(), device=OTHER_MACHINE)

    auto, strict = (judged(now, timed_row(), mode=mode) for mode in ("auto", "strict"))

    assert (auto.outcome, auto.fails, strict.fails) == ("not_comparable", False, True)
    assert FINGERPRINT in auto.words
    assert OTHER_MACHINE in auto.words


def test_an_estimate_is_not_compared_with_a_measurement():
    estimate = replace(timed_row(), status="estimated", reason="no counter on this machine")

    verdict = judged(estimate, timed_row())

    assert (verdict.outcome, verdict.fails) == ("not_comparable", False)
    assert "no counter on this machine" in verdict.words


@pytest.mark.parametrize(("mode", "fails"), [("auto", False), ("strict", True)])
@pytest.mark.parametrize(
    ("baseline", "outcome"),
    [(None, "no_baseline"), (recorded([healthy_row("rag.f1", value=0.5)]), "new")],
    ids=["no_baseline", "new"],
)
def test_what_is_not_recorded_names_the_command_that_records_it(mode, fails, baseline, outcome):
    verdict = judge(
        timed_row(),
        baseline,
        mode=mode,
        fingerprint=FINGERPRINT,
        context=CONTEXT,
        command="pytest bench --model nf4 --update-baselines",
        metrics=HEALTHY_METRICS,
    )

    assert (outcome, fails) == (verdict.outcome, fails)
    assert "`pytest bench --model nf4 --update-baselines`" in verdict.words


@pytest.mark.parametrize("changed", ["better", "unit", "kind"])
def test_a_metric_that_was_redefined_since_the_baseline_fails(changed):
    other = {"better": "higher", "unit": "s/token", "kind": "memory"}[changed]
    metric = replace(HEALTHY_METRICS["efficiency.decode_ms"], **{changed: other})
    row = healthy_row(**({changed: other} if changed != "kind" else {}))

    verdict = judge(
        row,
        recorded([healthy_row()]),
        mode="auto",
        fingerprint=FINGERPRINT,
        context=CONTEXT,
        metrics={metric.name: metric},
    )

    assert (verdict.outcome, verdict.fails) == ("not_comparable", True)
    assert other in verdict.words


def test_a_vanished_metric_is_missing_but_other_parameters_or_measurements_are_not():
    baseline = recorded(
        [
            timed_row(),
            healthy_row("efficiency.throughput", value=9.0, params=timed_row().params),
            healthy_row(params={"batch": 8}),
            healthy_row("rag.f1", value=0.7),
        ]
    )

    found = missing([timed_row()], baseline, FINGERPRINT)

    assert [(each.outcome, each.fails) for each in found] == [("missing", True)]
    assert found[0].key.startswith("efficiency.throughput[")
    assert "--update-baselines" in found[0].words
    assert missing([timed_row()], baseline, OTHER_MACHINE) == []
    assert missing([replace(timed_row(), recipe="llm_int8")], baseline, FINGERPRINT) == []


def test_data_hashes_may_be_a_table_by_kind_of_measurement():
    table = CONTEXT | {"data_hash": {"perplexity": "p", "rag": "r"}}
    before = [healthy_row("quality.perplexity"), healthy_row("rag.f1", value=0.5), timed_row()]
    baseline = recorded(before, context=table)
    changed = table | {"data_hash": {"perplexity": "p", "rag": "other"}}

    outcomes = [judged(row, baseline, context=changed).outcome for row in before]

    assert outcomes == ["pass", "not_comparable", "pass"]


def unavailable(row):
    return replace(
        row, value=None, ratio=None, base_value=None, samples=(), base_samples=(), status="not_available", reason="no X"
    )


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_what_cannot_be_had_here_says_so_and_passes_where_nothing_is_recorded(mode):
    rows = healthy_rows()

    found = gated([*rows[1:], unavailable(rows[0])], rows[1:], mode=mode)

    (verdict,) = [each for each in found if each.key == rows[0].key]
    assert (verdict.outcome, verdict.fails) == ("not_comparable", False)
    assert "no X" in verdict.words


def test_what_the_baseline_has_may_not_become_unavailable():
    rows = healthy_rows()

    (verdict,) = [each for each in gated([*rows[1:], unavailable(rows[0])], rows) if each.fails]

    assert verdict.key == rows[0].key
    assert "the baseline has it" in verdict.words


def test_what_is_not_available_is_not_recorded(tmp_path):
    rows = healthy_rows()

    verdicts.update(tmp_path, [unavailable(rows[0]), *rows[1:]], CONTEXT, FINGERPRINT, metrics=HEALTHY_METRICS)

    baseline = verdicts.Baseline.find(tmp_path, rows[0].base, rows[0].recipe)
    kept = {key for section in baseline.sections.values() for key in section.rows}
    assert kept == {row.key for row in rows[1:]}


@pytest.mark.parametrize(
    ("then", "now", "factor", "outcome"),
    [
        (None, "float32", 1.004, "pass"),
        ("float32", None, 1.004, "pass"),
        (None, "float32", 1.006, "regressed"),
        (None, "float32", 0.994, "improved"),
        (None, None, 1.004, "regressed"),
        ("float32", "float32", 1.0001, "regressed"),
        ("float32", "float32", 1 + 1e-12, "pass"),
    ],
)
def test_a_value_of_another_dtype_is_compared_by_the_tolerance_of_its_metric(then, now, factor, outcome):
    before = healthy_row("quality.perplexity", value=13.0, compute_dtype=then)
    verdict = judged(replace(before, value=13.0 * factor, compute_dtype=now), before, metrics=all_metrics())

    assert outcome == verdict.outcome
    assert (then != now) == ("tolerance 0.5 %" in verdict.words and "the stored dtype" in verdict.words)


def test_losses_that_all_moved_with_the_dtype_are_no_change():
    """The paired test would see it: every item moves the same way."""
    before = item_row("quality.nll", LOSSES)
    moved = replace(LOSSES, values=[value * 0.9995 for value in LOSSES.values])
    now = replace(before, value=moved.mean, items=moved, device=OTHER_MACHINE)

    assert "improved" == judged(now, before).outcome
    assert "pass" == judged(replace(now, compute_dtype="float32"), before).outcome


def test_other_items_are_refused_whatever_was_computed_in():
    before = item_row("quality.nll", LOSSES)
    other = replace(LOSSES, hashes=LOSSES.hashes[:-1], values=LOSSES.values[:-1])

    verdict = judged(replace(before, items=other, value=other.mean, compute_dtype="float32"), before)

    assert ("not_comparable", True) == (verdict.outcome, verdict.fails)


def test_the_noise_of_16_bits_in_a_small_divergence_is_no_change():
    metrics = all_metrics()
    before = replace(healthy_row("quality.nll", value=5e-4), metric="quality.kl_to_base", of="divergence")
    now = replace(before, value=2e-3, compute_dtype="float32")

    assert "pass" == judged(now, before, metrics=metrics).outcome
    assert "regressed" == judged(replace(now, value=3e-3), before, metrics=metrics).outcome
    assert "regressed" == judged(replace(now, compute_dtype=None), before, metrics=metrics).outcome


def test_what_was_computed_in_is_recorded_and_left_out_where_it_is_the_stored_dtype():
    entries = [
        recorded([healthy_row("quality.perplexity", value=13.0, compute_dtype=dtype)]).sections[ANYWHERE]
        for dtype in ("float32", None)
    ]

    wide, stored = (section.to_json()["rows"]["quality.perplexity"] for section in entries)

    assert "float32" == wide["compute_dtype"]
    assert "compute_dtype" not in stored
    for section in entries:
        assert section == Section.from_json(section.to_json(), {})


# --- Engines ----------------------------------------------------------------------------------------------------------

FLAGS = {"dtype_of_weights": "torch.bfloat16", "quantization": "None", "max_model_len": 4096}
SERVED = {"engine": "vllm", "version": "0.32.0", "torch": "2.13.0", "transformers": "5.19.0", "flags": FLAGS}


def served(row, **source):
    return replace(row, params=row.params | {"runtime": "vllm"}, source=SERVED | source)


@pytest.mark.parametrize(
    ("upgrade", "factor", "outcome", "words"),
    [
        ({}, 1.0, "pass", None),
        ({}, 1.0001, "regressed", None),
        ({"version": "0.33.0"}, 1.0001, "pass", "measured with vllm 0.33.0, the baseline with vllm 0.32.0"),
        ({"version": "0.33.0"}, 1.002, "regressed", "measured with vllm 0.33.0, the baseline with vllm 0.32.0"),
        ({"torch": "2.14.0"}, 1.0001, "pass", "measured with torch 2.14.0, the baseline with torch 2.13.0"),
        ({"transformers": None}, 1.0001, "pass", "transformers unknown, the baseline with transformers 5.19.0"),
        ({"flags": FLAGS | {"max_model_len": 512}}, 1.0001, "regressed", None),  # which changes no number
    ],
)
def test_a_number_of_an_upgraded_engine_is_compared_as_elsewhere_and_both_versions_are_said(
    upgrade, factor, outcome, words
):
    before = healthy_row("quality.perplexity", value=13.0)

    verdict = judged(served(replace(before, value=13.0 * factor), **upgrade), served(before))

    assert outcome == verdict.outcome
    assert words in verdict.words if words else "measured with" not in verdict.words


def test_a_timing_of_an_upgraded_engine_is_compared_and_the_versions_are_said():
    slower = replace(timed_row(own=4.2))

    verdict, same = (judged(served(slower, **upgrade), served(timed_row())) for upgrade in ({"version": "0.33.0"}, {}))

    assert ["regressed"] * 2 == [verdict.outcome, same.outcome]
    assert verdict.words.endswith("; measured with vllm 0.33.0, the baseline with vllm 0.32.0")
    assert "measured with" not in same.words


@pytest.mark.parametrize("row", [healthy_row("quality.perplexity", value=13.0), timed_row()])
@pytest.mark.parametrize(("name", "now"), [("dtype_of_weights", "torch.float16"), ("quantization", "fp8")])
def test_a_model_that_an_engine_opened_otherwise_is_not_comparable(row, name, now):
    verdict = judged(served(row, flags=FLAGS | {name: now}), served(row))

    assert (verdict.outcome, verdict.fails) == ("not_comparable", True)
    assert f"{name} of vllm was {FLAGS[name]!r} when the baseline was recorded and is {now!r}" in verdict.words


def test_a_baseline_that_names_no_engine_is_compared_as_it_was():
    before = healthy_row("quality.perplexity", value=13.0, params={"runtime": "vllm"})

    assert "regressed" == judged(served(replace(before, value=13.0013)), before).outcome


def test_items_of_an_upgraded_engine_are_compared_by_the_paired_test():
    before = served(item_row("quality.nll", LOSSES))
    moved = replace(before, value=before.value * 1.00005, items=replace_values(LOSSES, 1.00005))

    assert "regressed" == judged(moved, before).outcome
    assert "pass" == judged(replace(moved, source=SERVED | {"version": "0.33.0"}), before).outcome


def replace_values(items, factor):
    return type(items)(items.hashes, [value * factor for value in items.values], items.kind)
