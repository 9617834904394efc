"""The registry of metrics: what may be declared, and what a metric may return."""

import math
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import completed

from bench.errors import MetricError
from bench.metrics import all_metrics, metric, metrics_of, registry
from bench.metrics.registry import KINDS, Metric
from bench.results.row import BETTER


def declared(function=lambda measurement: measurement, **facts) -> Metric:
    return Metric(
        **{"name": "group.name", "unit": "ms", "better": "lower", "kind": "timing", "of": "generation"}
        | facts
        | {"function": function}
    )


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "METRICS", {})


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53) | st.fractions())
def test_a_finite_number_comes_back_as_a_float(number):
    result = declared()(number)

    assert type(result) is float
    assert float(number) == result


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, True, "1", 1j, [1.0], 10**400])
def test_what_is_no_finite_number_is_refused_by_the_name_of_the_metric(value):
    with pytest.raises(MetricError, match=r"group\.name"):
        declared()(value)


def test_the_refusal_shows_the_value():
    with pytest.raises(MetricError, match="nan is not finite"):
        declared()(math.nan)


def test_what_the_function_raises_is_not_disguised():
    def broken(measurement):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        declared(broken)(0)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"better": "smaller"}, "lower, higher, neither"),
        ({"kind": "guessed"}, "timing, memory, counted"),
        ({"name": "decode_ms"}, "<group>.<name>"),
        ({"name": "Efficiency.decode"}, "lower case"),
        ({"unit": ""}, "unit"),
        ({"of": ""}, "of must be a non-empty string"),
        ({"rel": -0.1}, "rel must be at least 0, not -0.1"),
        ({"rel": math.nan}, "rel: nan"),
        ({"rel": True}, "rel: it must be a number, not True"),
        ({"rel_absolute": -1.0}, "rel_absolute must be at least 0, not -1.0"),
        ({"floor": -1.0}, "floor must be at least 0, not -1.0"),
        ({"floor": math.inf}, "floor: inf"),
        ({"kind": "counted", "rel_absolute": 0.1}, "timing and memory"),
        ({"better": "higher", "rel": 1.0}, "drop to 0"),
    ],
    ids=lambda each: "-".join(f"{name}={value}" for name, value in each.items()) if isinstance(each, dict) else "",
)
def test_facts_that_cannot_be_are_refused_in_words(facts, words):
    with pytest.raises(MetricError, match=words):
        declared(**facts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("better", BETTER)
def test_every_kind_goes_with_every_direction(kind, better):
    assert (kind in ("timing", "memory")) == declared(kind=kind, better=better).per_device


def test_group_and_title_come_from_name_and_docstring():
    def function(measurement):
        """Milliseconds per token.

        More words.
        """

    assert declared(function, name="efficiency.decode_ms").group == "efficiency"
    assert declared(function).title == "Milliseconds per token."
    assert declared(lambda measurement: 1.0).title == ""


def test_the_decorator_registers_and_leaves_the_function_as_it_was(empty_registry):
    def double(measurement):
        return 2 * measurement

    returned = metric("some.double", unit="1", better="neither", kind="counted", of="number")(double)

    assert double is returned
    assert registry.METRICS["some.double"](Fraction(3)) == 6.0


def test_a_second_metric_of_one_name_is_refused_and_both_modules_are_named(empty_registry):
    def first(measurement): ...

    def second(measurement): ...

    first.__module__, second.__module__ = "bench.metrics.one", "bench.metrics.two"
    facts = {"unit": "1", "better": "neither", "kind": "counted", "of": "number"}
    metric("some.name", **facts)(first)

    with pytest.raises(MetricError, match=r"bench\.metrics\.one .*bench\.metrics\.two"):
        metric("some.name", **facts)(second)
    assert first is registry.METRICS["some.name"].function


def test_all_metrics_come_in_order_of_their_names():
    names = list(all_metrics())

    assert sorted(names) == names
    assert all(name == each.name for name, each in all_metrics().items())


def test_every_metric_says_in_one_line_what_it_is():
    assert [name for name, each in all_metrics().items() if not each.title] == []


def test_metrics_of_gives_those_that_read_one_kind_of_measurement():
    kinds = {each.of for each in all_metrics().values()}

    assert metrics_of("no such measurement") == []
    assert list(all_metrics().values()) == sorted(
        (each for kind in kinds for each in metrics_of(kind)), key=lambda each: each.name
    )


def test_metrics_results_and_gate_are_imported_without_torch_numpy_or_pandas():
    code = (
        "import sys, bench.gate.verdicts, bench.results.journal, bench.results.row, bench.metrics;"
        "bench.metrics.all_metrics();"
        "sys.exit(', '.join(sorted({'torch', 'numpy', 'pandas', 'transformers'} & set(sys.modules))) or 0)"
    )
    done = completed([sys.executable, "-c", code])

    assert (done.returncode, done.stderr.strip()) == (0, "")
