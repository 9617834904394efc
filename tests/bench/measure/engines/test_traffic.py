"""Requests at a rate: when they come, what becomes of them, and what is told of it."""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import small_runs
from engines import conversation, misbehaving
from hypothesis import given
from hypothesis import strategies as st

from bench import test_runtimes as served
from bench.errors import EngineError, NotAvailable, OptionError
from bench.measure.engines.engine import Options
from bench.measure.engines.environments import ENGINES, Requirement
from bench.measure.engines.traffic import Traffic, TrafficRound, TrafficServer
from bench.metrics import metrics_of
from bench.metrics.traffic import TrafficReading
from bench.session.served import Served
from compression import Recipe

ONE_AT_A_TIME = """
import time
class Model:
    def generate(self, prompts, new_tokens, stop_ids, sampling):
        yield from ((number, 7, time.perf_counter()) for number in range(len(prompts)) for _ in range(new_tokens))
    def arrive(self, prompts, moments, new_tokens):
        for number, moment in enumerate(moments):
            time.sleep(max(0.0, moment - time.perf_counter()))
            for _ in range(new_tokens):
                time.sleep(0.002)
                yield number, 7, time.perf_counter()
"""


# --- When they come ---------------------------------------------------------------------------------------------------


@given(st.floats(0.1, 100), st.integers(1, 40), st.integers(0, 99), st.integers(0, 9))
def test_arrivals_are_in_order_the_first_at_once_and_the_same_for_every_model(rate, requests, seed, index):
    traffic = Traffic(rate=rate, requests=requests)
    found = traffic.arrivals(seed, index)

    assert (requests, 0.0, sorted(found)) == (len(found), found[0], found)
    assert found == traffic.arrivals(seed, index)
    assert requests == 1 or found != traffic.arrivals(seed, index + 1)


def test_gaps_are_exponential_with_the_mean_of_the_rate():
    found = Traffic(rate=4, requests=20_001).arrivals(0, 0)
    gaps = [after - before for before, after in pairwise(found)]

    assert 1 / 4 == pytest.approx(mean(gaps), rel=0.03)  # 4 standard errors: 1 / sqrt(20000) each
    assert 0.3679 == pytest.approx(mean(gap > 1 / 4 for gap in gaps), abs=0.014)  # e^-1 of them are above the mean


@pytest.mark.parametrize(("wrong", "words"), [
    ({"rate": 0}, "rate must be above 0 and finite, not 0"), ({"rate": float("inf")}, "finite"),
    ({"rate": 1, "requests": 0}, "requests must be at least 1, not 0"),
])  # fmt: skip
def test_traffic_that_cannot_be_is_refused(wrong, words):
    with pytest.raises(OptionError, match=words):
        Traffic(**wrong)


# --- What becomes of them ---------------------------------------------------------------------------------------------


def test_a_request_that_waits_has_a_later_first_token_and_steps_of_its_own(tmp_path):
    with misbehaving(tmp_path, ONE_AT_A_TIME, options=Options(sequences=1, max_length=40)) as engine:
        traffic = Traffic(rate=200, requests=6, prompt_tokens=4, new_tokens=5)
        server = TrafficServer(engine, 10, traffic, seed=1)
        found = server.run(3)

    arrivals = traffic.arrivals(1, 3)
    assert 6 * 5 == found.tokens and 6 == len(found.ttft_s) == len(found.steps_s)
    assert found.total_s >= arrivals[-1] and found.total_s >= 6 * 5 * 0.002  # one after the other
    assert found.ttft_s[-1] > found.ttft_s[0] and min(found.ttft_s) >= 0.002
    assert all(0.002 <= step < 0.05 for step in found.steps_s)


@pytest.mark.parametrize(("arrivals", "words"), [
    ([0.0], "a time for each of 2 prompts, in order"), ([0.2, 0.1], "in order"), ([-1.0, 0.0], "in order"),
    ([0.0, float("inf")], "in order"),
])  # fmt: skip
def test_times_that_are_none_are_refused(tmp_path, arrivals, words):
    with misbehaving(tmp_path, ONE_AT_A_TIME) as engine, pytest.raises(OptionError, match=words):
        engine.arrive([[1], [2]], arrivals, 1)


def test_a_token_before_its_request_is_an_error(tmp_path):
    early = ONE_AT_A_TIME.replace("time.sleep(max(0.0, moment - time.perf_counter()))", "pass")

    with (
        misbehaving(tmp_path, early) as engine,
        pytest.raises(EngineError, match="behind the arrival of a prompt at 5"),
    ):
        engine.arrive([[1], [2]], [0.0, 5.0], 1)


@pytest.mark.parametrize("runtime", ["transformers", "llama.cpp"])
def test_an_engine_that_is_given_batches_is_not_available_and_not_opened(runtime):
    with pytest.raises(NotAvailable, match=f"{runtime} is asked for batches"):
        Served(SimpleNamespace(options=None)).traffic(runtime, Recipe(), Traffic(rate=1))


# --- What is told -----------------------------------------------------------------------------------------------------


def round_of(ttft, total):
    return TrafficRound(ttft_s=tuple(ttft), steps_s=tuple(each / 7 for each in ttft), total_s=total, tokens=60)


rounds = st.lists(
    st.builds(
        round_of,
        st.lists(st.floats(0.001, 9), min_size=5, max_size=5), st.floats(0.1, 9),
    ),
    min_size=1, max_size=60,
)  # fmt: skip


@given(rounds)
def test_figures_are_those_of_all_requests_counted_one_by_one(rounds):
    reading = TrafficReading(rounds=tuple(rounds))
    found = {metric.name.removeprefix("efficiency.rate_"): metric(reading) for metric in metrics_of("traffic")}
    times = [1e3 * value for each in rounds for value in each.ttft_s]

    for name, share in (("ttft_ms", 0.5), ("ttft_p99_ms", 0.99)):
        not_above = sum(time <= found[name] * (1 + 1e-12) for time in times) / len(times)
        below = sum(time < found[name] * (1 - 1e-12) for time in times) / len(times)
        assert below < share <= not_above
        assert found[name] / 7 == pytest.approx(found[name.replace("ttft", "step")])
    assert min(60 / each.total_s for each in rounds) <= found["throughput"] * (1 + 1e-12)
    assert f"{5 * len(rounds)} requests in {len(rounds)} rounds" in reading.remark
    assert ("is the slowest" in reading.remark) == (len(times) < 100)
    assert len(rounds) == len(reading.each())


def test_base_and_compressed_are_measured_under_the_same_arrivals(tmp_path, monkeypatch):
    script = tmp_path / "engine.py"
    script.write_text(conversation(ONE_AT_A_TIME).replace("'vocabulary': 10", "'vocabulary': 300"))
    monkeypatch.setitem(ENGINES, "vllm", Requirement(module="json", install=(), variable="NONE", script=str(script),
                                                     joins=True))  # fmt: skip
    small_runs.make_base(tmp_path)
    seen = []
    monkeypatch.setattr(TrafficServer, "run", lambda server, index, run=TrafficServer.run: seen.append(
        (server.engine.pid, server.traffic.arrivals(server.seed, index))) or run(server, index))  # fmt: skip
    test = partial(served.test_served_traffic, runtime="vllm", request_rate=100.0)
    run = small_runs.one_run(
        tmp_path, "magnitude", measurements={"traffic": test}, runtimes=("vllm",), runs=2, warmup=1, requests=3,
        runtime_pythons={"vllm": Path(sys.executable)}, batch_sizes=(1, 4),
    )  # fmt: skip

    assert [] == run.failing
    rows = {row.metric: row for row in run.rows.values() if row.of == "traffic"}
    assert {metric.name for metric in metrics_of("traffic")} == set(rows)
    row = rows["efficiency.rate_ttft_p99_ms"]
    assert {"rate": 100.0, "requests": 3, "batch": 4, "runtime": "vllm"}.items() <= row.params.items()
    assert row.base_value and 2 == len(row.samples) == len(row.base_samples)
    assert "6 requests in 2 rounds" in row.reason
    base, own = ([arrivals for pid, arrivals in seen if pid == each] for each in dict.fromkeys(pid for pid, _ in seen))
    assert base == own and 3 == len(own)
