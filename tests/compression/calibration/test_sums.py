"""Sums over the calibration text: the same bytes however many workers share it, and those of a plain recursion."""

from fractions import Fraction

import pytest
import torch
from block_by_block import same
from checkpoints import transformers_model
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import gaussian, seeds
from threads import together

import compression
from compression.calibration.observers import PANEL, Hessian, Largest, Mean, Norms, Sample
from compression.calibration.sums import LEAVES, Share, Sums, Tree
from compression.workers import Workers

KINDS = {"hessian": Hessian, "mean": Mean, "largest": Largest, "sample": Sample, "norms": lambda n: Norms(n, 64)}
counts = st.integers(1, 6)
samples = st.integers(1, 3 * LEAVES)


def worker(rank, count):
    made = Workers()
    made.rank, made.count = rank, count
    return made


@given(samples, counts)
def test_every_sample_has_one_worker_and_one_run_and_both_keep_the_order(n, count):
    runs = [run for rank in range(count) for run in Share(n, worker(rank, count)).runs()]

    assert list(range(min(LEAVES, n))) == [number for number, _ in runs]
    assert list(range(n)) == [sample for _, run in runs for sample in run]
    assert 1 >= max(map(lambda run: len(run[1]), runs)) - min(map(lambda run: len(run[1]), runs))
    for rank in range(count):
        share = Share(n, worker(rank, count))
        assert list(share.of()) == [sample for _, run in share.runs() for sample in run]


def value(observer):
    kept = observer.value()
    return [kept._squares, kept._sample.value()] if isinstance(kept, Norms) else [kept]


def summed(kind, texts, count, owner):
    """What `owner` gets of text that so many workers share."""

    def work(group):
        sums, share = Sums(["x"], lambda _: KINDS[kind](texts[0].shape[-1])), Share(len(texts), group)
        for run, mine in share.runs():
            for sample in mine:
                sums.see("x", texts[sample])
            sums.keep(run)
        found = sums.given_to("x", owner, group)
        return None if found is None else value(found)

    results = together(work, count)
    assert all(result is None for rank, result in enumerate(results) if rank != owner)
    return results[owner]


@settings(max_examples=40)
@given(st.sampled_from(sorted(KINDS)), seeds, samples, counts, st.data())
def test_any_number_of_workers_come_to_the_bytes_of_one(kind, seed, n, count, data):
    texts = [gaussian(5, 7, seed=seed + i, std=10.0 ** (i % 5 - 2)) for i in range(n)]

    one = summed(kind, texts, 1, 0)
    several = summed(kind, texts, count, data.draw(st.integers(0, count - 1)))

    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


@given(seeds, st.permutations(range(LEAVES)), st.integers(1, LEAVES))
def test_runs_may_come_in_any_order_and_any_of_them_be_missing(seed, order, there):
    """An expert sees nothing of some runs; what it sees of the others is added in the same way on any worker."""
    kept = sorted(order[:there])

    def total(positions):
        tree = Tree()
        for run in positions:
            observer = Mean(3)
            observer.add(gaussian(4, 3, seed=seed + run, std=1))
            tree.put(run, observer)
        return tree.given_to(0, Workers()).value()

    assert torch.equal(total(kept), total(order[:there]))


def by_recursion(sums, begin=0, size=LEAVES):
    """Halves of the runs, each by itself, then their sum; in the numbers of `sums`, by run."""
    if size == 1:
        return sums.get(begin)
    halves = [by_recursion(sums, begin + half, size // 2) for half in (0, size // 2)]
    there = [half for half in halves if half is not None]
    return sum(there[1:], there[0]) if there else None


@given(seeds, st.integers(1, 20), st.integers(1, 40))
def test_a_sum_is_that_of_the_recursion_and_nearly_the_exact_one(seed, n, tokens):
    texts = [gaussian(tokens, 3, seed=seed + i, std=10.0 ** (i % 7 - 3)) for i in range(n)]
    products = [text.t() @ text for text in texts]
    runs, exact = {}, [[Fraction(0)] * 3 for _ in range(3)]
    for number, run in Share(n).runs():
        runs[number] = torch.zeros(3, 3, dtype=torch.float64)
        for sample in run:
            runs[number] += products[sample]
    for product in products:
        exact = [[a + Fraction(b) for a, b in zip(*rows, strict=True)]
                 for rows in zip(exact, product.tolist(), strict=True)]  # fmt: skip
    expected = (by_recursion(runs) * (2 / (n * tokens))).float().triu()

    actual = summed("hessian", texts, 1, 0)[0]

    assert torch.equal(expected, actual.triu()) and torch.equal(actual, actual.t())
    largest = max(abs(float(each)) for row in exact for each in row)
    for row, found in zip(exact, by_recursion(runs).tolist(), strict=True):
        assert all(abs(float(Fraction(b) - a)) <= 1e-14 * largest for a, b in zip(row, found, strict=True))


@pytest.mark.parametrize("cols", [PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 40])
def test_a_hessian_of_several_panels_is_whole_and_symmetric(cols):
    observer, texts = Hessian(cols), [gaussian(9, cols, seed=i, std=1) for i in range(3)]
    for text in texts:
        observer.add(text)
    x = torch.cat(texts).double()

    torch.testing.assert_close(observer.value().double(), 2 * x.t() @ x / len(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(observer.value(), observer.value().t())


SETTINGS = "samples=5,sequence_length=12"
RECIPES = {
    "LlamaForCausalLM": [
        f"gptq(group_size=8,{SETTINGS})", f"awq(group_size=8,{SETTINGS})", f"sparsegpt({SETTINGS})",
        f"wanda({SETTINGS})-rtn(group_size=8)", f"smoothquant(activations=static,{SETTINGS})", f"kvquant({SETTINGS})",
        "hqq(group_size=8)", f"int8(rounding=gptq,{SETTINGS})", f"smoothquant(rounding=gptq,{SETTINGS})",
    ],
    "MixtralForCausalLM": [f"gptq(group_size=8,{SETTINGS})", f"awq(group_size=8,{SETTINGS})"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "text"), [(family, text) for family, recipes in RECIPES.items() for text in recipes]
)
def test_workers_make_the_model_and_the_report_that_one_makes(family, text, tmp_path):
    transformers_model(family).save_pretrained(tmp_path)

    def work(group):
        return compression.compress(str(tmp_path), text, calibration="random", workers=group)

    [one] = together(work, 1)
    for count in (2, 3):
        for result in together(work, count):
            assert same(one.model.state_dict(), result.model.state_dict())
            assert (one.report, one.notes) == (result.report, result.notes)
