"""Static ranges by observers: against plain formulas, their laws, and text that cannot be taken."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import gaussian, seeds

import compression
from compression import LayerError, RecipeError
from compression.calibration.ranges import MOMENTUM, Ranging
from compression.layers.activations import TokenRange
from compression.layers.ranges import AffineRange
from compression.numeric import whole_numbers

COLS, RULES = 12, ("min_max", "moving_average", "percentile", "mse")


def seen(rule, texts, **settings):
    observer = Ranging(COLS, rule=rule, tokens=sum(map(len, texts)), **settings)
    for text in texts:
        observer.add(text[None])
    return observer


def texts_of(seed, lengths):
    return [gaussian(n, COLS, seed=seed + i, std=1).exp() - 1 for i, n in enumerate(lengths)]


@given(st.sampled_from(RULES), seeds, st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 5))
def test_merging_is_having_seen_both(rule, seed, lengths, cut):
    texts = texts_of(seed, lengths)
    make = functools.partial(Ranging, COLS, rule=rule, tokens=sum(lengths), hessian=True)
    one, other, both = make(), make(), make()
    for number, text in enumerate(texts):
        (one if number < cut else other).add(text)
        both.add(text)

    one.merge(other)

    merged, whole = one.value(), both.value()
    for name in ("low", "high", "largest"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name))
    torch.testing.assert_close(merged.reached.hessian, whole.reached.hessian)
    torch.testing.assert_close(merged.fit(8, symmetric=False), whole.fit(8, symmetric=False))


@given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_ends_are_what_formulas_give(seed, lengths):
    texts = texts_of(seed, lengths)
    whole, averaged = seen("min_max", texts).value(), seen("moving_average", texts).value()

    every = torch.cat(texts)
    assert torch.equal(every.amin(0), whole.low)
    assert torch.equal(every.amax(0), whole.high)
    mean = texts[0].amax(0)
    for text in texts[1:]:
        mean = MOMENTUM * mean + (1 - MOMENTUM) * text.amax(0)
    torch.testing.assert_close(averaged.high, mean)


def test_a_percentile_leaves_out_what_is_rare():
    text = gaussian(4000, COLS, std=1)
    text[7, 3] = 1000.0

    high = seen("percentile", [text]).value().fit(8, symmetric=True)[0] * 127

    ordered = text.flatten().sort().values
    assert pytest.approx(float(ordered[-round(len(ordered) * 0.00005) :][0]), rel=0.2) == float(high)


@given(seeds, st.sampled_from([3, 4, 8]), st.booleans())
def test_least_squares_err_no_more_than_the_whole_range(seed, bits, symmetric):
    text = texts_of(seed, [200])

    def error(rule):
        steps, zeros = seen(rule, text).value().fit(bits, symmetric=symmetric)
        return float((whole_numbers.rounded(text[0], steps, zeros, bits, symmetric=symmetric) - text[0]).square().sum())

    assert error("min_max") >= error("mse")


@given(seeds, st.sampled_from(RULES), st.sampled_from([4, 8]))
def test_a_step_of_each_token_errs_less_than_any_static_one_on_its_text(seed, rule, bits):
    text = texts_of(seed, [200])[0]
    steps, _ = seen(rule, [text]).value().fit(bits, symmetric=True)

    dynamic, static = (
        float((part(text) - text).square().mean()) for part in (TokenRange(bits), TokenRange(bits, steps))
    )

    assert static >= dynamic


@given(seeds)
def test_what_is_shifted_lies_around_zero(seed):
    ranges = seen("mse", texts_of(seed, [60])).value()
    middle = (ranges.low + ranges.high) / 2

    left = ranges.shifted(middle)

    torch.testing.assert_close(left.low, -left.high)
    torch.testing.assert_close(left.sample, ranges.sample - middle)
    assert ranges.shifted(None) is ranges


def test_clusters_have_the_widest_range_of_their_channels_and_empty_ones_a_step():
    ranges = seen("min_max", [torch.tensor([[-1.0, 2.0, 30.0] + [0.0] * 9, [0.5, 1.0, -1.0] + [0.0] * 9])]).value()
    index = torch.tensor([0, 0, 2] + [0] * 9)

    steps, zeros = ranges.fit(8, symmetric=False, index=index, count=4)

    torch.testing.assert_close(steps, torch.tensor([3 / 255, 1.0, 31 / 255, 1.0]))
    torch.testing.assert_close(zeros, torch.tensor([85.0, 0.0, 8.0, 0.0]))
    for rule in ("percentile", "mse"):
        found, _ = seen(rule, texts_of(3, [50])).value().fit(4, symmetric=False, index=index, count=4)
        assert (found > 0).all()


# --- In recipes -------------------------------------------------------------------------------------------------------

IDS = torch.randint(48, (6, 24), generator=torch.Generator().manual_seed(4))
SMALL = "samples=6,sequence_length=24"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["int8", "smoothquant"])
def test_each_observer_gives_its_step(folder, name, rule):
    base = compression.open_base(str(folder))
    result = compression.compress(base, f"{name}(activations=static,observer={rule},{SMALL})", calibration=IDS)
    default = compression.compress(base, f"{name}(activations=static,{SMALL})", calibration=IDS)

    step, of_default = (float(each.model.model.layers[1].mlp.up_proj.input_part.step) for each in (result, default))
    assert of_default * 1.001 >= step > 0
    assert rule not in ("moving_average", "mse") or of_default > step  # so few values are all within a percentile
    assert rule != "min_max" or of_default == step


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("name", ["int8", "smoothquant"])
def test_bits_are_those_of_weights_and_activations(folder, name, bits):
    result = compression.compress(str(folder), f"{name}(bits={bits},{SMALL})", calibration=IDS)
    layer = result.model.model.layers[0].mlp.up_proj

    assert (bits, bits) == (layer.weight_part.grid.bits, layer.input_part.bits)
    assert bits == 8 or {"simulated": 14} == result.kernels()


def test_fixed_point_has_powers_of_two_on_both_sides(folder):
    result = compression.compress(str(folder), f"int8(scale=power_of_two,activations=static,{SMALL})", calibration=IDS)
    layer = result.model.model.layers[0].mlp.up_proj

    for scales in (layer.weight_part.scales, layer.input_part.step):
        assert torch.equal(scales.log2(), scales.log2().round())
    token = compression.compress(str(folder), "int8(scale=power_of_two)").model.model.layers[0].mlp.up_proj
    assert isinstance(token.input_part, AffineRange)


@pytest.mark.parametrize("rule", ["min_max", "mse"])
def test_activations_that_are_no_numbers_are_refused_by_the_name_of_the_layer(folder, rule):
    base = compression.open_base(str(folder))
    base.model.model.layers[1].post_attention_layernorm.weight.data[3] = torch.nan
    for name, more in (("int8", "activations=static,"), ("smoothquant", "activations=static,"), ("rptq", ""),
                       ("os_plus", "")):  # fmt: skip
        with pytest.raises(
            LayerError, match=r"layers\.1\.mlp\.gate_proj: the inputs of the calibration text .* finite"
        ):
            compression.compress(base, f"{name}({more}observer={rule},{SMALL})", calibration=IDS)


def test_an_observer_without_a_static_range_is_refused():
    for name in ("int8", "smoothquant", "os_plus"):
        with pytest.raises(RecipeError, match="ranges of tokens are found at run time, and need no observer"):
            compression.Recipe.parse(f"{name}(activations=token,observer=mse)")


def test_layers_have_the_observer_of_the_recipe(folder):
    recipe = f'int8(activations=static,{SMALL},layers={{"*.o_proj":{{"observer":"mse"}}}})'

    with pytest.raises(LayerError, match=r"o_proj: its inputs were observed by min_max, not mse; set observer=mse for"):
        compression.compress(str(folder), recipe, calibration=IDS)
