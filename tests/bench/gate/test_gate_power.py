"""The simulation of the gate says what the gate says, and its rates hold on a small number of runs."""

from dataclasses import replace

import numpy as np
import pytest
from healthy_results import CONTEXT, FINGERPRINT, recorded, timed_row
from scripts import benchmark

from bench.gate import comparison, verdicts
from bench.gate.comparison import LOOKS
from bench.metrics import METRICS, all_metrics
from bench.statistics.timing_change import ESTIMATES

gate_power = benchmark("gate_power")

BESIDE = [condition for condition in gate_power.CONDITIONS if condition.startswith("beside")]


def decode():
    all_metrics()
    return METRICS["efficiency.decode_ms"]


@pytest.mark.parametrize("condition", gate_power.CONDITIONS)
def test_one_look_of_the_simulation_is_the_verdict_of_the_gate(condition):
    numbers, metric, rows = np.random.default_rng(0), decode(), 12
    now, then = (gate_power.draw(condition, rows, rounds, numbers) for rounds in (20, 30))
    now = now._replace(own=now.own + np.linspace(-0.3, 0.4, rows)[:, None])
    simulated = gate_power.look(now, then, metric, 0.005)

    def row(side, place):
        own, base = (tuple(np.exp(each[place]).tolist()) for each in side)
        value, base_value = float(np.median(own)), float(np.median(base))
        return replace(
            timed_row(), value=value, base_value=base_value, ratio=value / base_value, samples=own, base_samples=base
        )

    outcomes = [
        verdicts.judge(
            row(now, place),
            recorded([row(then, place)]),
            mode="auto",
            fingerprint=FINGERPRINT,
            context=CONTEXT,
            metrics={metric.name: metric},
            shares=verdicts.Levels(timed=0.005, items=0.005),
        ).outcome
        for place in range(rows)
    ]

    assert outcomes == [gate_power.OUTCOMES[each] for each in simulated]
    assert len(set(outcomes)) > 1


@pytest.mark.parametrize("condition", BESIDE)
def test_one_look_at_two_states_of_the_code_is_the_verdict_of_the_gate(condition):
    numbers, rows = np.random.default_rng(0), 12
    metric = all_metrics()["against.decode_ms"]
    sides = gate_power.draw(condition, rows, 40, numbers)
    sides = sides._replace(own=sides.own + np.linspace(-0.05, 0.06, rows)[:, None])
    simulated = gate_power.look(sides, gate_power.Rounds(sides.base, sides.own), metric, 0.005)

    outcomes = []
    for place in range(rows):
        own, other = (tuple(np.exp(side[place]).tolist()) for side in sides)
        value, base_value = float(np.median(own)), float(np.median(other))
        row = replace(
            timed_row(), metric=metric.name, of=metric.of, value=value, base_value=base_value,
            ratio=value / base_value, samples=own, base_samples=other,
        )  # fmt: skip
        outcomes.append(
            verdicts.judge_beside(
                row, level=0.005, mode="auto", fingerprint=FINGERPRINT, context=CONTEXT, metrics={metric.name: metric}
            ).outcome
        )

    assert outcomes == [gate_power.OUTCOMES[each] for each in simulated]
    assert {"pass", "regressed", "improved"} <= set(outcomes)


@pytest.mark.parametrize("condition", gate_power.CONDITIONS)
def test_runs_of_a_hundred_unchanged_rows_raise_no_alarm_in_more_than_one_of_a_hundred(condition):
    shares = gate_power.false_alarms(condition, 60, 100, recorded_rounds=100)

    assert shares.regressed + shares.improved <= 1 / 60
    assert shares.peer > 0.9


def test_a_slower_decode_is_found_on_recorded_noise_and_a_little_one_is_not():
    def found(slower):
        return gate_power.found("stalls", slower, 400, 100, recorded_rounds=100).regressed

    assert found(0.10) > 0.99
    assert found(0.04) == 0


@pytest.mark.parametrize("condition", BESIDE)
def test_five_percent_between_two_states_of_the_code_are_found_and_half_a_percent_is_not(condition):
    least = 0.5 if condition == "beside crowded" else 0.95
    assert gate_power.found(condition, 0.05, 400, 100, recorded_rounds=100).regressed > least
    assert gate_power.found(condition, 0.10, 400, 100, recorded_rounds=100).regressed > 0.98
    assert gate_power.found(condition, 0.005, 100, 100, recorded_rounds=100).regressed == 0


def test_without_the_gates_level_there_would_be_alarms(monkeypatch):
    monkeypatch.setattr(verdicts, "LEVEL", 50.0)

    shares = gate_power.false_alarms("starved", 20, 100, recorded_rounds=100, tolerance=0.01)

    assert shares.regressed + shares.improved > 0.5


@pytest.mark.parametrize(("ratio", "checks"), [(True, 2), (False, 1)])
def test_the_tails_of_all_that_can_raise_an_alarm_on_a_row_add_up_to_its_level(ratio, checks):
    """Two sides, each check, each look that can be the last word, each estimate."""
    assert len(verdicts.checks_of(decode(), ratio=ratio)) == checks
    assert 2 * checks * LOOKS * ESTIMATES * verdicts.one_sided(0.01, checks) == pytest.approx(0.01)


@pytest.fixture(scope="module")
def two_checks():
    """Unchanged rows whose ratio and value hardly depend on each other, of normal noise: intervals are exact."""
    numbers = np.random.default_rng(0)
    draws = numbers.normal(0, (0.01, 0.03), (2, 4_000, 100, 2))
    return [gate_power.Rounds(*run.transpose(2, 0, 1)) for run in draws]


@pytest.mark.parametrize("counted", [True, False])
def test_a_row_of_two_checks_raises_an_alarm_no_more_often_than_its_level(two_checks, counted, monkeypatch):
    """Without a tolerance to hide behind, and with one estimate; counted as one check it is beyond the level."""
    (now, then), level = two_checks, 0.2
    monkeypatch.setattr(comparison, "ESTIMATES", 1)
    if not counted:
        monkeypatch.setattr(verdicts, "one_sided", lambda level, checks: comparison.one_sided(level, 1))
    metric = replace(decode(), rel=0.0, rel_absolute=0.0, floor=0.0, share=1.0)

    alarms = np.zeros(len(now.own), dtype=bool)
    for times in verdicts.MORE:  # every look at which a change can be believed
        so_far = gate_power.Rounds(*(side[:, : times * gate_power.USUAL] for side in now))
        alarms |= np.isin(gate_power.look(so_far, then, metric, level), (gate_power.REGRESSED, gate_power.IMPROVED))

    assert (alarms.mean() <= level) == counted
    assert alarms.mean() > level / 2
