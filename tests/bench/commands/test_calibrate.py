"""What reruns of the same thing tell of a machine, and how they are kept."""

import json
import random
from collections import Counter

import pytest
from checkpoints import says

from bench.commands import calibrate_gate
from bench.commands.calibrate_gate import judged, noise, report
from bench.commands.reruns import Rerun, kept
from bench.errors import BenchError, OptionError
from bench.gate import tolerances, verdicts
from bench.metrics import METRICS, all_metrics, metrics_of

FACTS = {"model": "nf4", "torch": "2.13.0"}


def decode():
    all_metrics()
    return METRICS["efficiency.decode_ms"]


def reruns(count, *, scatter=0.01, between=0.0, slower=1.0, rounds=100, seed=0):
    numbers = random.Random(seed)
    found = []
    for number in range(count):
        off = numbers.gauss(1, between) * (slower if number == count - 1 else 1)
        sides = [[centre * abs(numbers.gauss(1, scatter)) for _ in range(rounds)] for centre in (2.0 * off, 4.0)]
        own, base = ({"efficiency.decode_ms": each} for each in sides)
        found.append(Rerun(own=own, base=base))
    return found


def test_reruns_of_nothing_new_raise_no_alarm_and_the_last_one_that_is_slower_does():
    (calm,) = noise(reruns(12), [decode()], runs=10, rows=100)
    (slower,) = noise(reruns(12, slower=1.1), [decode()], runs=10, rows=100)

    assert (calm.alarms, calm.pairs) == (0, 11 + 6)  # each with the one before, and with the sixth before
    assert (slower.alarms, slower.outcomes["regressed"]) == (2, 2)


def test_what_is_visible_is_found_and_half_of_it_is_not():
    (calm,) = noise(reruns(12), [decode()], runs=10, rows=100)

    def found(slower, seed):
        then, now = reruns(2, slower=slower, seed=seed)
        return (
            judged(now, then, [decode()], 10, verdicts.LEVEL / 2 / 100, "here")["efficiency.decode_ms"] == "regressed"
        )

    assert sum(found(1 + calm.visible, seed) for seed in range(20)) >= 17
    assert sum(found(1 + calm.visible / 2, seed) for seed in range(20)) <= 3


def test_what_reruns_differ_by_beyond_their_rounds_is_proposed_as_tolerance():
    proposed = [noise(reruns(12, between=each), [decode()], runs=10, rows=100)[0].proposed for each in (0.0, 0.1)]

    assert proposed[0] <= 0.02
    assert proposed[1] > 0.1


def test_slowdowns_of_five_and_ten_percent_are_looked_for_and_found_where_the_noise_lets_them():
    beside = {each.name: each for each in metrics_of(verdicts.AGAINST)}["against.decode_ms"]

    def copies(scatter):
        return [
            Rerun(own={beside.name: each.base["efficiency.decode_ms"][::-1]},
                  base={beside.name: each.base["efficiency.decode_ms"]})
            for each in reruns(8, scatter=scatter)
        ]  # fmt: skip

    (calm,), (wild,) = (noise(copies(scatter), [beside], runs=10, rows=100) for scatter in (0.004, 0.5))
    (base,) = noise(reruns(8), [decode()], runs=10, rows=100)

    assert ((8, 8), (0, 0)) == (calm.found, wild.found)
    assert (0, base.pairs) == base.found  # the tolerance of a ratio is 5 %


@pytest.mark.parametrize("name", ["efficiency.decode_ms", "efficiency.throughput"])
def test_the_peers_rule_counts_reruns_whose_median_is_worse_than_that_of_the_one_before(name):
    metric = all_metrics()[name]
    worse = 1.06 if metric.better == "lower" else 1 / 1.06
    values = [1.0, 1.0 * worse, 1.0, 1.04, 1.0]
    several = [Rerun(own={name: [value] * 10}, base={name: [1.0] * 10}) for value in values]

    (found,) = noise(several, [metric], runs=10, rows=100)

    assert 1 == found.peer


def test_the_report_counts_alarms_and_says_of_what():
    text = report(noise(reruns(4, slower=1.5), [decode()], runs=10, rows=100), rows=100)

    assert "2 false alarms in 5 rows (5 pairs of reruns" in text
    assert "| efficiency.decode_ms |" in text


def test_two_reruns_are_too_few():
    with pytest.raises(OptionError, match=says("at least 3 reruns", "not 2")):
        noise(reruns(2), [decode()], runs=10, rows=100)


def test_a_journal_is_read_without_the_line_that_a_kill_cut_off_and_refused_for_other_facts(tmp_path):
    journal = tmp_path / "calibration.jsonl"
    (one,) = reruns(1)
    lines = [{"kind": "calibration", **FACTS}, {"kind": "rerun", "own": one.own, "base": one.base}]
    journal.write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "rerun", "own": {"eff', encoding="utf-8")

    assert kept(journal, FACTS) == [one]
    assert kept(tmp_path / "none.jsonl", FACTS) == []
    with pytest.raises(BenchError, match=says("torch was '2.13.0', is '2.14.0'")):
        kept(journal, FACTS | {"torch": "2.14.0"})
    journal.write_text("{}\n", encoding="utf-8")
    with pytest.raises(BenchError, match=says("not the journal of a calibration")):
        kept(journal, FACTS)


@pytest.mark.process
def test_the_command_measures_what_is_missing_and_no_more(tmp_path, capsys):
    journal = tmp_path / "calibration.jsonl"
    command = ["--reruns", "3", "--seconds", "0.1", "--runs", "5", "--prompt-tokens", "4", "--max-new-tokens", "3"]
    command += ["--journal", str(journal), "--processes", "1"]
    calibrate_gate.main(command)
    first = journal.read_text(encoding="utf-8")
    journal.write_text(first[:-40], encoding="utf-8")

    calibrate_gate.main(command)
    again = journal.read_text(encoding="utf-8")

    assert again.startswith(first[:-40] + "\n")
    assert 3 == sum('"rerun"' in line and line.endswith("}}") for line in again.splitlines())
    assert "false alarms in" in capsys.readouterr().out


@pytest.mark.process
def test_processes_share_the_reruns(tmp_path):
    journal = tmp_path / "calibration.jsonl"
    few = ["--seconds", "0.1", "--runs", "5", "--prompt-tokens", "4", "--max-new-tokens", "3"]

    calibrate_gate.main([*few, "--journal", str(journal), "--reruns", "6", "--processes", "2"])

    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()][1:]
    assert [3, 3] == sorted(Counter(each["process"] for each in lines).values())


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """A command that finds so many reruns in its journal, of processes that differ by so much."""
    facts = FACTS | {"fingerprint": "cpu-here-1t"}
    monkeypatch.setattr(calibrate_gate, "_facts", lambda given: facts)
    monkeypatch.setattr(calibrate_gate, "timed", lambda beside: [decode()])

    def command(count, between, *options):
        found = [{"kind": "rerun", "own": each.own, "base": each.base} for each in reruns(count, between=between)]
        journal = tmp_path / "calibration.jsonl"
        journal.write_text("\n".join(map(json.dumps, [{"kind": "calibration", **facts}, *found])), encoding="utf-8")
        calibrate_gate.main(["--journal", str(journal), "--baselines", str(tmp_path), "--reruns", str(count), *options])

    return command


def test_proposed_tolerances_are_recorded_where_that_is_asked_for(tmp_path, calibrated, capsys):
    calibrated(20, 0.01)
    assert {} == tolerances.read(tmp_path)

    calibrated(20, 0.01, "--write")

    facts = tolerances.read(tmp_path)["cpu-here-1t"]
    (expected,) = noise(reruns(20, between=0.01), [decode()], runs=10, rows=100)
    assert {"efficiency.decode_ms": expected.proposed} == facts["rel"]
    assert 0.01 < expected.proposed < 0.1
    assert 20 == facts["context"]["reruns"]
    capsys.readouterr()
    calibrated(20, 0.01)  # and are what the next one compares with
    [line] = [line for line in capsys.readouterr().out.splitlines() if "efficiency.decode_ms" in line]
    assert f"{100 * expected.proposed:.3g} %" == line.split("|")[11].strip()


@pytest.mark.parametrize(("count", "between", "words"), [(19, 0.0, "--reruns must be at least 20, not 19"),
                                                         (20, 0.3, "no tolerance may be above 25 %")])  # fmt: skip
def test_few_reruns_and_noisy_ones_are_not_recorded(tmp_path, calibrated, capsys, count, between, words):
    with pytest.raises(SystemExit) as refused:
        calibrated(count, between, "--write")

    assert words in f"{refused.value}{capsys.readouterr().err}"
    assert {} == tolerances.read(tmp_path)


def test_two_copies_of_one_model_are_compared_with_each_other_and_a_slow_one_is_seen():
    beside = {each.name: each for each in metrics_of(verdicts.AGAINST)}["against.decode_ms"]
    copies = [
        Rerun(own={beside.name: each.base["efficiency.decode_ms"][::-1]},
              base={beside.name: each.base["efficiency.decode_ms"]})
        for each in reruns(8, scatter=0.004, between=0.2)
    ]  # fmt: skip
    slow = Rerun(own={beside.name: [1.05 * each for each in copies[0].own[beside.name]]}, base=copies[0].base)

    (equal,) = noise(copies, [beside], runs=10, rows=100)
    (one,) = noise([*copies, slow], [beside], runs=10, rows=100)

    assert (8, 0, 8) == (equal.pairs, equal.alarms, equal.outcomes["pass"])
    assert (8, 8) == equal.found
    assert (9, 1) == (one.pairs, one.outcomes["regressed"])
