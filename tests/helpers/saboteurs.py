"""Negative controls: things that are broken on purpose, each of which a check of ours must catch. Never registered."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from packed_layers import pack_linear

from bench.results.items import Items, hashes_of
from bench.results.row import Row
from compression.layers.linear import Linear
from compression.layers.report import LayerReport
from compression.methods.quantization.weight_only.rtn import RTN
from compression.numeric.sparsity import choose, removed

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


def with_items(rows: list[Row], metric: str, change: Callable[[list[float]], list[float]]) -> list[Row]:
    """The rows, the results per item of one metric changed, and with them its value."""

    def spoil(row: Row) -> Row:
        items = Items(row.items.hashes, change(list(row.items.values)), row.items.kind)
        return replace(row, items=items, value=items.mean)

    return altered(rows, metric, spoil)


def lose(values: list[float], lost: int, gained: int) -> list[float]:
    """The first `lost` right answers become wrong, and the first `gained` wrong ones right."""
    right = [place for place, value in enumerate(values) if value][:lost]
    wrong = [place for place, value in enumerate(values) if not value][:gained]
    return [1 - value if place in {*right, *wrong} else value for place, value in enumerate(values)]


def one_answer_in_a_hundred_is_lost(rows: list[Row]) -> list[Row]:
    return with_items(rows, "quality.accuracy", lambda values: lose(values, 20, 0))


def one_answer_in_a_hundred_is_lost_among_others_that_flip(rows: list[Row]) -> list[Row]:
    return with_items(rows, "quality.accuracy", lambda values: lose(values, 30, 10))


def every_window_loses_half_a_thousandth(rows: list[Row]) -> list[Row]:
    return with_items(rows, "quality.nll", lambda values: [value * 1.0005 for value in values])


def other_questions_are_asked(rows: list[Row]) -> list[Row]:
    def spoil(row: Row) -> Row:
        return replace(row, items=Items(hashes_of(range(len(row.items))), row.items.values, "binary"))

    return altered(rows, "quality.accuracy", spoil)


def results_per_item_vanish(rows: list[Row]) -> list[Row]:
    return altered(rows, "quality.accuracy", lambda row: replace(row, items=None))


BROKEN_ITEMS = (
    one_answer_in_a_hundred_is_lost,
    one_answer_in_a_hundred_is_lost_among_others_that_flip,
    every_window_loses_half_a_thousandth,
)

BROKEN_RESULTS = (
    *BROKEN_ITEMS,
    other_questions_are_asked,
    results_per_item_vanish,
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


# --- Broken methods that the contract must catch: each is rounding to nearest with one thing wrong --------------------


@dataclass(frozen=True, kw_only=True)
class ScalesAreOffByOneGroup(RTN):
    """Every group takes the scale of its neighbour."""

    def compress_linear(self, linear, context):
        layer = super().compress_linear(linear, context)
        layer.weight_part.scales = layer.weight_part.scales.roll(1, 1)
        return layer


@dataclass(frozen=True, kw_only=True)
class ZeroPointsAreIgnored(RTN):
    """What is decoded lies between 0 and the range, wherever the range began."""

    def compress_linear(self, linear, context):
        layer = super().compress_linear(linear, context)
        layer.weight_part.zero_points = torch.zeros_like(layer.weight_part.zero_points)
        return layer


class _RoundsOnlyWhenAsked(Linear):
    def dequantize(self, dtype=None):
        return super().dequantize(dtype).roll(1, 0)


@dataclass(frozen=True, kw_only=True)
class DequantizeIsNotWhatForwardUses(RTN):
    """The product is right, the weight that one gets back is not."""

    def compress_linear(self, linear, context):
        layer = super().compress_linear(linear, context)
        layer.__class__ = _RoundsOnlyWhenAsked
        return layer


@dataclass(frozen=True, kw_only=True)
class ReturnsItsInput(RTN):
    """Nothing is compressed, and all of it reported as replaced."""

    def compress_linear(self, linear, context):
        return linear


@dataclass(frozen=True, kw_only=True)
class SkipsALayerInSilence(RTN):
    """The last linear of every block stays as it is, and no word of it."""

    def apply_block(self, block, seen, context):
        *linears, _ = block.linears()
        for name, linear in linears:
            block.replace(name, self.compress_linear(linear, context))
            context.report.append(LayerReport(name, "replaced", "rounded"))


@dataclass(frozen=True, kw_only=True)
class ReportsALayerThatItSkips(RTN):
    """The last linear of every block stays as it is, and is reported as replaced."""

    def apply_block(self, block, seen, context):
        *linears, last = block.linears()
        for name, linear in linears:
            block.replace(name, self.compress_linear(linear, context))
        context.report += [LayerReport(name, "replaced", "rounded") for name, _ in (*linears, last)]


@dataclass(frozen=True, kw_only=True)
class WritesIntoTheBase(RTN):
    """The base's own weights are rounded in place."""

    def compress_linear(self, linear, context):
        layer = super().compress_linear(linear, context)
        linear.weight.data.copy_(layer.dequantize())
        return layer


@dataclass(frozen=True, kw_only=True)
class WastesBits(RTN):
    """Codes of 4 bits, stored in 8."""

    def compress_linear(self, linear, context):
        return RTN(bits=8, group_size=self.group_size).compress_linear(linear, context)


@dataclass(frozen=True, kw_only=True)
class DropsTheBias(RTN):
    """The bias is lost on the way."""

    def compress_linear(self, linear, context):
        return pack_linear(linear.weight, None, self.grid())


@dataclass(frozen=True, kw_only=True)
class ForgetsTheSeed(RTN):
    """Every run rounds otherwise, with noise that no seed governs."""

    def compress_linear(self, linear, context):
        weight = linear.weight + 1e-3 * torch.randn_like(linear.weight)
        return pack_linear(weight, linear.bias, self.grid())


@dataclass(frozen=True, kw_only=True)
class MendsWhatIsNotFinite(RTN):
    """NaN becomes zero, and nobody hears of it."""

    def compress_linear(self, linear, context):
        return pack_linear(linear.weight.nan_to_num(0), linear.bias, self.grid())


@dataclass(frozen=True, kw_only=True)
class ClipsOutliers(RTN):
    """What lies beyond six standard deviations is cut off."""

    def compress_linear(self, linear, context):
        limit = 6 * float(linear.weight.float().std())
        return pack_linear(linear.weight.clamp(-limit, limit), linear.bias, self.grid())


@dataclass(frozen=True, kw_only=True)
class MovesZero(RTN):
    """Zero is no longer a level."""

    def compress_linear(self, linear, context):
        return pack_linear(linear.weight + 1e-4, linear.bias, self.grid())


@dataclass(frozen=True, kw_only=True)
class ChecksTheGroupsTooLate(RTN):
    """Groups that do not divide are found when some layers are done already."""

    def check_layer(self, in_features, out_features):
        pass


@dataclass(frozen=True, kw_only=True)
class KeepsASecretBesideTheState(RTN):
    """A factor that is applied but not saved."""

    def compress_linear(self, linear, context):
        layer = pack_linear(linear.weight / 2, linear.bias, self.grid())
        layer.register_forward_hook(lambda module, inputs, y: 2 * y if module.bias is None else 2 * y - module.bias)
        return layer


# Each with the check of the contract that is there to catch it.
BROKEN_METHODS = {
    ScalesAreOffByOneGroup: "test_outputs_and_weights_are_as_near_as_the_row_says",
    ZeroPointsAreIgnored: "test_outputs_and_weights_are_as_near_as_the_row_says",
    DequantizeIsNotWhatForwardUses: "test_outputs_and_weights_are_as_near_as_the_row_says",
    ReturnsItsInput: "test_every_linear_is_reported_and_the_report_is_true",
    SkipsALayerInSilence: "test_every_linear_is_reported_and_the_report_is_true",
    ReportsALayerThatItSkips: "test_every_linear_is_reported_and_the_report_is_true",
    WritesIntoTheBase: "test_the_base_keeps_every_bit",
    WastesBits: "test_what_is_stored_is_what_the_formula_adds_up_to",
    DropsTheBias: "test_a_weight_of_zero_gives_the_bias_alone",
    ForgetsTheSeed: "test_the_same_seed_gives_the_same_bytes",
    MendsWhatIsNotFinite: "test_a_weight_that_is_not_finite_is_refused_naming_the_layer",
    ClipsOutliers: "test_one_outlier_survives_and_spoils_no_other_row",
    MovesZero: "test_a_weight_of_zero_gives_the_bias_alone",
    ChecksTheGroupsTooLate: "test_groups_that_do_not_divide_are_refused_before_any_work",
    KeepsASecretBesideTheState: "test_what_is_saved_and_opened_again_computes_the_same_bits",
}


# --- Broken masks that the law of counts must catch: each stands in for `numeric.sparsity.choose` ----------------


def takes_ties_too(scores, share, pattern, *, by_row):
    """Everything up to the threshold goes, however much that is."""
    if pattern is not None:
        return choose(scores, share, pattern, by_row=by_row)
    units = scores if by_row else scores.reshape(1, -1)
    threshold = units.sort(-1).values[:, removed(share, units.shape[-1]) - 1, None]
    return (units <= threshold).view_as(scores)


def takes_the_largest(scores, share, pattern, *, by_row):
    """As many as promised, and the wrong ones."""
    return choose(-scores, share, pattern, by_row=by_row)


def counts_over_all_rows(scores, share, pattern, *, by_row):
    """The promised share of the layer, but not of every row."""
    return choose(scores, share, pattern, by_row=False)


def keeps_m_minus_n(scores, share, pattern, *, by_row):
    """The n of a pattern are taken for those that go."""
    return choose(scores, share, pattern and (pattern[1] - pattern[0], pattern[1]), by_row=by_row)


BROKEN_MASKS = (takes_ties_too, takes_the_largest, counts_over_all_rows, keeps_m_minus_n)
