import math
import threading
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import BenchError, MetricError, OptionError
from bench.machine import device as machine
from bench.metrics.energy import EnergyReading, Rapl, SampledPower, energy_mj_per_token, measure_energy, measure_in_turn

RANGE = 262_143_328_850  # microjoules at which a package counter turns over


def package(root, folder, name, microjoules, largest=RANGE):
    """A powercap domain as Linux shows it."""
    (root / folder).mkdir(exist_ok=True)
    for file, text in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", largest)):
        (root / folder / file).write_text(f"{text}\n")


class Time:
    """A clock that stands still until it is told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Counter:
    """A source that gives the readings listed, then the last one for ever; an exception in the list is raised."""

    def __init__(self, *readings, source="counter"):
        self.source, self.readings, self.closed = source, list(readings), False

    def read_joules(self):
        reading = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        if isinstance(reading, Exception):
            raise reading
        return reading

    def close(self):
        self.closed = True


def measured(*counters, seconds=2.0, tokens=10, **options):
    """The energy of units of work that take `seconds` each, read from the counters in order."""
    clock = Time()

    def work():
        clock.now += seconds
        return tokens

    readers = [lambda counter=counter: counter for counter in counters]
    return measure_energy(work, device="cpu", clock=clock, readers=readers, **options)


@settings(deadline=None, max_examples=30)
@given(spent=st.lists(st.integers(0, RANGE), min_size=1, max_size=8), start=st.integers(0, RANGE))
def test_a_package_counter_that_turns_over_loses_nothing(spent, start):
    with TemporaryDirectory() as folder:
        root = Path(folder)
        package(root, "intel-rapl:0", "package-0", start)
        rapl, shown = Rapl(root), start
        for step in spent:
            shown = (shown + step) % (RANGE + 1)
            package(root, "intel-rapl:0", "package-0", shown)
            joules = rapl.read_joules()

    assert math.isclose(joules, sum(spent) / 1e6, rel_tol=1e-9, abs_tol=1e-9)


def test_the_packages_add_up_and_what_lies_inside_them_does_not(tmp_path):
    for joules in (0, 3):
        package(tmp_path, "intel-rapl:0", "package-0", joules * 10**6)
        package(tmp_path, "intel-rapl:0:0", "core", joules * 10**6)
        package(tmp_path, "intel-rapl:1", "package-1", joules * 10**6)
        package(tmp_path, "intel-rapl:2", "psys", joules * 10**6)
        package(tmp_path, "intel-rapl-mmio:0", "package-0", joules * 10**6)
        if joules == 0:
            rapl = Rapl(tmp_path)

    assert rapl.read_joules() == 6.0


def test_a_machine_without_package_counters_is_refused_in_words(tmp_path):
    package(tmp_path, "intel-rapl:0:0", "core", 1)

    with pytest.raises(BenchError, match="no package counter"):
        Rapl(tmp_path)


def test_a_counter_that_only_root_may_read_says_how_to_open_it(tmp_path, monkeypatch):
    package(tmp_path, "intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def guarded(path, *arguments, **options):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", guarded)

    with pytest.raises(BenchError, match=r"energy_uj is readable by root only; make it readable with chmod a\+r"):
        Rapl(tmp_path)


@pytest.mark.parametrize("text", ["", "lots"])
def test_a_counter_that_shows_no_number_is_refused(tmp_path, text):
    package(tmp_path, "intel-rapl:0", "package-0", text)

    with pytest.raises(BenchError, match="RAPL"):
        Rapl(tmp_path)


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.tuples(st.floats(0.001, 100), st.floats(0, 1000)), min_size=2, max_size=20),
    first=st.floats(0, 1000),
)
def test_sampled_power_adds_up_to_the_area_under_it(steps, first):
    clock, power = Time(), SimpleNamespace(now=first)
    sampler = SampledPower(lambda: power.now, period=3600, clock=clock)
    try:
        readings = [sampler.read_joules()]
        for seconds, watts in steps:
            clock.now += seconds
            power.now = watts
            readings.append(sampler.read_joules())
    finally:
        sampler.close()

    watts = [first, *(each for _, each in steps)]
    area = sum(s * (a + b) / 2 for (s, _), (a, b) in zip(steps, pairwise(watts), strict=True))
    assert readings == sorted(readings)
    assert math.isclose(readings[-1], area, rel_tol=1e-6, abs_tol=1e-6)


def test_power_is_sampled_while_nobody_asks():
    enough, seen = threading.Event(), []

    def watts():
        seen.append(50.0)
        if len(seen) > 3:
            enough.set()
        return 50.0

    sampler = SampledPower(watts, period=0.001)

    assert enough.wait(30)
    sampler.close()
    assert sampler.read_joules() > 0


def test_a_sensor_that_falls_silent_is_told_at_the_next_reading():
    asked = threading.Event()

    def watts():
        if asked.is_set():
            raise BenchError("the sensor fell silent")
        asked.set()
        return 50.0

    sampler = SampledPower(watts, period=0.001)
    sampler._thread.join(30)

    with pytest.raises(BenchError, match="fell silent"):
        sampler.read_joules()
    sampler.close()


def test_the_work_is_repeated_until_the_window_is_long_enough():
    reading = measured(Counter(7.0, 8.0, 9.0, 13.0), seconds=2.0, tokens=10, min_seconds=5.0)

    assert (reading.joules, reading.seconds, reading.tokens) == (6.0, 6.0, 30)
    assert (reading.source, reading.estimated) == ("counter", False)


def test_the_first_source_that_works_is_taken():
    reading = measured(Counter(0.0, 1.0, source="first"), Counter(0.0, 2.0, source="second"), min_seconds=1)

    assert (reading.source, reading.joules) == ("first", 1.0)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (Counter(5.0, source="stuck"), "stuck did not advance in 2.0 s"),
        (Counter(5.0, 4.0, source="falling"), "falling did not advance"),
        (Counter(BenchError("no such counter")), "no such counter"),
        (Counter(5.0, BenchError("lost it")), "lost it"),
    ],
    ids=["stuck", "falling", "never", "lost"],
)
def test_a_source_that_fails_is_passed_over_aloud(broken, said):
    reading = measured(broken, Counter(0.0, 3.0, source="next"), min_seconds=1)

    assert (reading.source, reading.joules) == ("next", 3.0)
    assert said in reading.note
    assert broken.closed


def test_without_a_counter_the_papers_estimate_is_given_and_marked():
    reading = measured(Counter(0.0), seconds=2.0, min_seconds=4, tdp=70)

    assert math.isclose(reading.joules, 0.7 * 70 * 4)
    assert (reading.source, reading.estimated) == ("tdp", True)
    assert "idle 0.3 TDP, TDP 70 W as given (option)" in reading.note
    assert "counter did not advance" in reading.note


@settings(deadline=None, max_examples=40)
@given(seconds=st.floats(0.01, 10), units=st.integers(1, 50), watts=st.floats(1, 1000))
def test_the_estimate_of_a_window_is_the_sum_over_its_units(seconds, units, watts):
    one = measured(seconds=seconds, min_seconds=seconds / 2, tdp=watts)
    many = measured(seconds=seconds, min_seconds=seconds * (units - 0.5), tdp=watts)

    assert math.isclose(many.joules, units * one.joules, rel_tol=1e-6)
    assert math.isclose(energy_mj_per_token(many), energy_mj_per_token(one), rel_tol=1e-6)


@pytest.mark.parametrize("window", [0, -5, float("nan"), float("inf")])
def test_a_window_that_cannot_be_is_refused_before_any_work(window):
    with pytest.raises(OptionError, match="min_seconds"):
        measured(min_seconds=window)


def test_work_that_generates_nothing_is_an_error_and_not_an_infinity():
    counter = Counter(0.0, 1.0)

    with pytest.raises(MetricError, match="at least 1 token, not 0"):
        measured(counter, tokens=0)
    assert counter.closed


@pytest.mark.parametrize("wrong", [{"joules": 0.0}, {"joules": float("nan")}, {"seconds": -1.0}, {"tokens": 0}])
def test_a_reading_of_nothing_cannot_be_made(wrong):
    good = {"joules": 1.0, "seconds": 1.0, "tokens": 1, "source": "rapl", "estimated": False, "note": ""}

    with pytest.raises(MetricError, match=f"{next(iter(wrong))} must be finite and above 0"):
        EnergyReading(**good | wrong)


def test_the_papers_figure_for_fp16_on_a_t4_comes_out():
    reading = measured(seconds=0.06248, tokens=1, min_seconds=0.06, tdp=70)

    assert energy_mj_per_token(reading) == pytest.approx(3061.60, rel=1e-4)


def test_this_machine_gives_an_energy_and_says_from_where():
    work = torch.ones(64, 64)

    reading = measure_energy(lambda: int((work @ work)[0, 0]), device="cpu", min_seconds=0.05)

    assert energy_mj_per_token(reading) > 0
    assert reading.estimated is (reading.source != "rapl")
    assert reading.note


@pytest.mark.parametrize("counter", [True, False], ids=["counter", "no-counter"])
def test_a_gpu_is_read_by_its_counter_or_by_its_power(monkeypatch, counter):
    class Driver:
        """A GPU that draws 100 W, with a counter of its energy or without."""

        def __init__(self, device):
            pass

        def joules(self):
            if not counter:
                raise BenchError("NVML does not answer nvmlDeviceGetTotalEnergyConsumption")
            return 100 * time.perf_counter()

        def watts(self):
            return 100.0

    monkeypatch.setattr(machine, "Nvml", Driver)
    monkeypatch.setattr(machine, "device_of", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    reading = measure_energy(lambda: 3, device="cuda", min_seconds=0.01)

    assert reading.source == ("nvml_counter" if counter else "nvml_power")
    assert reading.joules > 0
    assert ("TotalEnergyConsumption" in reading.note) is not counter


def test_the_device_is_waited_for_before_both_ends_of_the_window(monkeypatch):
    order = []
    monkeypatch.setattr(machine, "synchronize", lambda device: order.append("wait"))
    clock = Time()

    class Watched(Counter):
        def read_joules(self):
            order.append("read")
            return super().read_joules()

    def work():
        order.append("work")
        clock.now += 6
        return 1

    measure_energy(work, device="cpu", clock=clock, readers=[lambda: Watched(0.0, 1.0)])

    assert order == ["wait", "read", "work", "wait", "read"]


def in_turn(*seconds, **options):
    """Units of work of these lengths, measured in turn: the order in which they ran, and the readings."""
    clock, order = Time(), []

    def work_of(which):
        def work():
            clock.now += seconds[which]
            order.append(which)
            return 10

        return work

    works = [work_of(which) for which in range(len(seconds))]
    return order, measure_in_turn(works, device="cpu", clock=clock, readers=(), tdp=100.0, **options)


def test_windows_alternate_and_add_up():
    order, (short, long) = in_turn(0.5, 1.0)

    assert order == [0, 0, 1] * 5
    assert (short.seconds, long.seconds) == (5.0, 5.0)
    assert (short.tokens, long.tokens) == (100, 50)
    assert [len(reading.each()) for reading in (short, long)] == [5, 5]
    assert short.estimated
    assert energy_mj_per_token(long) == 2 * energy_mj_per_token(short) == 1000 * 0.7 * 100 * 1.0 / 10


def test_work_longer_than_the_window_is_done_once():
    order, readings = in_turn(7.0, 6.0)

    assert order == [0, 1]
    assert [reading.seconds for reading in readings] == [7.0, 6.0]


def test_one_disturbed_window_does_not_move_the_energy_per_token():
    clock, lengths = Time(), iter([1.0, 1.0, 9.0, 1.0, 1.0])

    def work():
        clock.now += next(lengths)
        return 10

    (reading,) = measure_in_turn([work], device="cpu", clock=clock, readers=(), tdp=100.0, min_seconds=11.0, windows=11)

    assert energy_mj_per_token(reading) == 1000 * 0.7 * 100 * 1.0 / 10


def test_windows_of_different_sources_say_so():
    counters = iter([Counter(0.0, 5.0), Counter(0.0, 0.0)])
    clock = Time()

    def work():
        clock.now += 1.0
        return 10

    (reading,) = measure_in_turn(
        [work], device="cpu", clock=clock, readers=(lambda: next(counters),), tdp=100.0, min_seconds=2.0, windows=2
    )

    assert (reading.source, reading.estimated) == ("counter and tdp", True)
    assert "did not advance" in reading.note
