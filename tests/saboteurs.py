"""Negative controls: things that are broken on purpose, each of which a check of ours must catch. Never registered."""

from collections.abc import Callable
from dataclasses import replace

from bench.results import Row

# --- Broken results that the gate must catch: each takes a sound run of nf4 and returns it broken ---------------------


def altered(rows: list[Row], metric: str, change: Callable[[Row], Row]) -> list[Row]:
    """The rows, those of one metric changed."""
    return [change(row) if row.metric == metric else row for row in rows]


def scaled(row: Row, own: float, base: float = 1.0) -> Row:
    """The row with its own side, and that of the base, multiplied."""
    value, base_value = row.value * own, row.base_value * base
    return replace(
        row,
        value=value,
        base_value=base_value,
        ratio=value / base_value,
        samples=tuple(each * own for each in row.samples),
        base_samples=tuple(each * base for each in row.base_samples),
    )


def value_is_nan(rows: list[Row]) -> list[Row]:
    def spoil(row: Row) -> Row:
        row = replace(row)
        object.__setattr__(row, "value", float("nan"))  # Row itself would refuse it
        return row

    return altered(rows, "quality.perplexity", spoil)


def metric_vanishes(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.metric != "efficiency.throughput"]


def row_is_there_twice(rows: list[Row]) -> list[Row]:
    return [*rows, replace(rows[0], run="run-2")]


def direction_is_swapped(rows: list[Row]) -> list[Row]:
    return altered(rows, "efficiency.decode_ms", lambda row: replace(scaled(row, 2.0), better="higher"))


def unit_is_another(rows: list[Row]) -> list[Row]:
    return altered(rows, "efficiency.decode_ms", lambda row: replace(scaled(row, 0.001), unit="s/token"))


def both_sides_are_slow_so_that_the_ratio_holds(rows: list[Row]) -> list[Row]:
    return altered(rows, "efficiency.decode_ms", lambda row: scaled(row, 1.4, 1.4))


def decode_is_slow(rows: list[Row]) -> list[Row]:
    return altered(rows, "efficiency.decode_ms", lambda row: scaled(row, 1.4))


def decode_is_slow_on_a_machine_that_became_faster(rows: list[Row]) -> list[Row]:
    return altered(rows, "efficiency.decode_ms", lambda row: scaled(row, 1.03, 0.7))


def throughput_falls(rows: list[Row]) -> list[Row]:
    return altered(rows, "efficiency.throughput", lambda row: scaled(row, 0.7))


def memory_grows(rows: list[Row]) -> list[Row]:
    return altered(rows, "efficiency.peak_mb", lambda row: scaled(row, 1.08))


def one_byte_more_is_stored(rows: list[Row]) -> list[Row]:
    return altered(rows, "efficiency.stored_bytes", lambda row: scaled(row, 1 + 1 / row.value))


def a_layer_is_dropped(rows: list[Row]) -> list[Row]:
    return altered(rows, "efficiency.layers", lambda row: replace(row, value=row.value - 1))


def perplexity_rises_by_a_fifth_of_a_percent(rows: list[Row]) -> list[Row]:
    return altered(rows, "quality.perplexity", lambda row: scaled(row, 1.002))


def answers_get_worse(rows: list[Row]) -> list[Row]:
    return altered(rows, "rag.f1", lambda row: scaled(row, 0.9))


def answers_of_both_models_get_worse(rows: list[Row]) -> list[Row]:
    return altered(rows, "rag.f1", lambda row: scaled(row, 0.9, 0.9))


def memory_ran_out(rows: list[Row]) -> list[Row]:
    lost = {"value": None, "ratio": None, "status": "out_of_memory", "reason": "9 GiB wanted, 8 GiB there"}
    return altered(rows, "efficiency.peak_mb", lambda row: replace(row, **lost))


def seed_is_another(rows: list[Row]) -> list[Row]:
    return [replace(row, seed=row.seed + 1) for row in rows]


def rows_are_of_another_machine(rows: list[Row]) -> list[Row]:
    return [replace(row, device="cpu-other-64t") for row in rows]


def metric_is_not_declared(rows: list[Row]) -> list[Row]:
    return altered(rows, "efficiency.layers", lambda row: replace(row, metric="efficiency.layer"))


BROKEN_RESULTS = (
    value_is_nan,
    metric_vanishes,
    row_is_there_twice,
    direction_is_swapped,
    unit_is_another,
    both_sides_are_slow_so_that_the_ratio_holds,
    decode_is_slow,
    decode_is_slow_on_a_machine_that_became_faster,
    throughput_falls,
    memory_grows,
    one_byte_more_is_stored,
    a_layer_is_dropped,
    perplexity_rises_by_a_fifth_of_a_percent,
    answers_get_worse,
    answers_of_both_models_get_worse,
    memory_ran_out,
    seed_is_another,
    rows_are_of_another_machine,
    metric_is_not_declared,
)
