"""The divergence from the base: against whole tensors in double precision, by its laws, and read beside the loss."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from bytewise_llama import TEXTS, VOCABULARY, data, data_of, model, tokenizer  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

import bench.measure.perplexity as module
from bench.errors import DataError, MetricError
from bench.measure import divergence
from bench.measure.divergence import diverge, shares
from bench.measure.perplexity import KeptStates, perplexity
from bench.measure.perplexity_windows import PerplexityProtocol
from bench.metrics.divergence import kl_to_base, top1_agreement


@pytest.fixture(scope="module")
def other(model):  # noqa: F811
    changed = deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in changed.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return changed


def read(model, tokenizer, data, base=None, **settings):  # noqa: F811
    return perplexity(model, tokenizer, data, PerplexityProtocol(**settings), device="cpu", base=base)


@st.composite
def logits(draw):
    seed, size = draw(st.integers(0, 2**31)), (draw(st.integers(1, 300)), draw(st.integers(2, 40)))
    numbers = torch.Generator().manual_seed(seed)
    width = draw(st.sampled_from([0.1, 1.0, 30.0]))
    return [width * torch.randn(size, generator=numbers) for _ in range(2)]


@given(logits())
def test_the_divergence_is_that_of_whole_tensors_in_double_precision(pair):
    base, other = pair
    kl, same = diverge(base, other)

    p, q = (each.double().log_softmax(-1) for each in pair)
    torch.testing.assert_close(kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=2e-5)
    assert (kl > -2e-5).all()
    assert same.tolist() == [int(a) == int(b) for a, b in zip(base.argmax(-1), other.argmax(-1), strict=True)]


@given(logits(), st.floats(-20, 20))
def test_a_constant_added_to_all_logits_is_no_divergence_and_nothing_diverges_from_itself(pair, constant):
    base, _ = pair

    assert diverge(base, base)[0].abs().max() == 0
    assert diverge(base, base + constant)[0].abs().max() < 1e-4


def test_the_direction_is_from_the_base():
    base, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(9.0), 0.0]])

    assert diverge(base, other)[0].item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert diverge(other, base)[0].item() == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))


@pytest.mark.parametrize("name", ["default", "e"])
def test_it_is_read_beside_a_loss_that_keeps_every_bit(model, other, tokenizer, data, name):  # noqa: F811
    alone = read(other, tokenizer, data, name=name, samples=9, length=48)
    beside = read(other, tokenizer, data, name=name, samples=9, length=48, base=model)

    assert replace(beside, divergence=None) == alone
    samples = module.samples_of(tokenizer, data, beside.protocol, context=1024)
    expected, agreed = [], []
    for sample in samples:
        with torch.no_grad():
            p, q = (m(torch.tensor([sample.ids])).logits[0, :-1].double().log_softmax(-1) for m in (model, other))
        p, q = p[sample.first_scored - 1 :], q[sample.first_scored - 1 :]
        expected.append((p.exp() * (p - q)).sum().item())
        agreed.append(float((p.argmax(-1) == q.argmax(-1)).sum()))
    assert beside.divergence.kl == pytest.approx(expected, rel=1e-4)
    assert beside.divergence.agreed == tuple(agreed)
    assert kl_to_base(beside.divergence) == pytest.approx(sum(expected) / alone.tokens, rel=1e-4)
    assert 0 < top1_agreement(beside.divergence) < 1


def test_the_base_does_not_differ_from_itself(model, tokenizer, data):  # noqa: F811
    found = read(model, tokenizer, data, samples=9, length=48, base=model).divergence

    assert found == found.of_itself
    assert (kl_to_base(found), top1_agreement(found)) == (0, 1)


def test_items_make_the_metrics_and_are_of_the_samples_that_the_loss_is_of(model, other, tokenizer, data):  # noqa: F811
    reading = read(other, tokenizer, data, name="e", samples=20, length=100, base=model)
    losses, distances = reading.items, reading.divergence.items

    assert len({items.asked for items in (*losses.values(), *distances.values())}) == 1
    assert losses["quality.nll"].mean == pytest.approx(reading.mean_nll, rel=1e-6)
    assert distances["quality.kl_to_base"].mean == pytest.approx(kl_to_base(reading.divergence), rel=1e-6)
    assert distances["quality.top1_agreement"].mean == pytest.approx(top1_agreement(reading.divergence), rel=1e-6)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=20))
def test_the_mean_of_the_shares_is_the_mean_over_tokens(samples):
    sums, tokens = zip(*samples, strict=True)

    assert sum(shares(sums, tokens)) / len(sums) == pytest.approx(sum(sums) / sum(tokens))


def test_probabilities_exist_for_a_few_positions_at_a_time(monkeypatch):
    base, other = torch.randn(300, 7), torch.randn(300, 7)
    whole = diverge(base, other)
    monkeypatch.setattr(divergence, "ROWS", 50)
    sizes, log_softmax = [], torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, dim: (sizes.append(len(x)), log_softmax(x, dim))[1])

    torch.testing.assert_close(diverge(base, other), whole)
    assert sizes == [50] * 12


def test_a_divergence_that_is_not_finite_names_the_sample(model, tokenizer, tmp_path):  # noqa: F811
    broken = deepcopy(model)
    broken.model.embed_tokens.weight.data[tokenizer.convert_tokens_to_ids("Z")] = math.nan
    data = data_of(tmp_path, ["a plain row of text", "a row with a Z in it", "another plain row"])  # noqa: F811

    with pytest.raises(MetricError, match=r"divergence from the base of sample 2 of 3 \(row 1\) is nan"):
        read(model, tokenizer, data, name="e", base=broken)


def test_a_base_of_another_vocabulary_is_refused(model, other, tokenizer, data, monkeypatch):  # noqa: F811
    monkeypatch.setattr(other.config, "vocab_size", VOCABULARY + 1)

    with pytest.raises(
        DataError, match=f"the base has a vocabulary of {VOCABULARY + 1}, the model one of {VOCABULARY}"
    ):
        read(model, tokenizer, data, base=other)


@pytest.mark.parametrize("settings", [{"length": 16}, {"name": "e", "length": 12}], ids=["windows", "rows"])
@pytest.mark.parametrize("limit", [2**31, 9000], ids=["all kept", "some kept"])
def test_a_base_that_is_read_once_gives_every_bit_of_one_that_is_read_each_time(
    model, other, tokenizer, data, settings, limit  # noqa: F811
):  # fmt: skip
    protocol, states, passes = PerplexityProtocol(**settings, batch_size=2), KeptStates(model, limit), []
    counted = model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    kept, read_so_far = [], []
    try:
        for each, base in ((model, None), (other, model), (other, model)):
            kept.append(perplexity(each, tokenizer, data, protocol, device="cpu", base=base, states=states))
            read_so_far.append(len(passes))
    finally:
        counted.remove()

    beside = read(other, tokenizer, data, base=model, batch_size=2, **settings)
    assert [read(model, tokenizer, data, batch_size=2, **settings), beside, beside] == kept
    first, second, third = read_so_far
    assert first > 0
    assert second - first == third - second
    assert second == first if limit == 2**31 else 0 < second - first < first
