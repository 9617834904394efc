"""Methods that were sound when their baseline was recorded and are not any more: each is caught by a whole run."""

import itertools
import random
from statistics import median
from types import SimpleNamespace

import pytest
from packed_layers import holds, pack_linear
from small_runs import MEASUREMENTS, make_base, measured, one_run, options

import compression
from bench import test_efficiency as efficiency
from bench.machine import cpu_wait
from bench.measure import generation, memory, memory_process
from bench.session.session import Workbench
from compression import Recipe
from compression.layers.linear import Linear
from compression.methods.quantization.weight_only.rtn import RTN

RECIPE = "rtn(group_size=32)"
SOUND = RTN.compress_linear
COMPRESS = compression.compress


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A checkpoint with a baseline of the sound method; and that the sound method passes, strictly."""
    folder = tmp_path_factory.mktemp("saboteurs")
    make_base(folder)
    assert [] == one_run(folder, RECIPE, update=True).failing
    assert [] == one_run(folder, RECIPE, gate="strict").failing
    return folder


def returns_its_input(self, linear, context):
    return linear


def stores_double(self, linear, context):
    layer = SOUND(self, linear, context)
    layer.register_buffer("again", layer.weight_part.codes.clone())
    return layer


class _Nominal(Linear):
    @property
    def stored_bytes(self):
        return self.in_features * self.out_features * 4 // 8


def reports_nominal_bits(self, linear, context):
    layer = SOUND(RTN(bits=8, group_size=self.group_size), linear, context)
    layer.__class__ = _Nominal
    return layer


def changes_with_the_seed_that_nobody_gave(self, linear, context):
    import torch

    return pack_linear(linear.weight + 1e-4 * torch.randn_like(linear.weight), linear.bias, self.grid())


def drops_a_layer_in_silence(result):
    result.model.model.layers = result.model.model.layers[:-1]
    result.model.config.num_hidden_layers -= 1


def returns_nan_logits(result):
    result.model.lm_head.weight.data[0, 0] = float("nan")


IN_THE_METHOD = {
    returns_its_input: "efficiency.stored_bytes regressed",
    stores_double: "are written: a size is what is stored",
    reports_nominal_bits: "are written: a size is what is stored",
    changes_with_the_seed_that_nobody_gave: "quality.",
}
IN_THE_RESULT = {
    drops_a_layer_in_silence: "efficiency.parameters regressed",
    returns_nan_logits: "perplexity could not be measured (failed)",
}


@pytest.mark.parametrize("saboteur", IN_THE_METHOD, ids=lambda each: each.__name__)
def test_a_method_that_is_sabotaged_fails_its_run(root, monkeypatch, saboteur):
    monkeypatch.setattr(RTN, "compress_linear", saboteur)

    failing = one_run(root, RECIPE, gate="strict").failing

    assert any(IN_THE_METHOD[saboteur] in words for words in failing)


@pytest.mark.parametrize("saboteur", IN_THE_RESULT, ids=lambda each: each.__name__)
def test_a_result_that_is_sabotaged_fails_its_run(root, monkeypatch, saboteur):
    def compress(base, plan, **given):
        result = COMPRESS(base, plan, **given)
        if plan.recipe.steps:
            saboteur(result)
        return result

    monkeypatch.setattr(compression, "compress", compress)

    failing = one_run(root, RECIPE).failing

    assert any(IN_THE_RESULT[saboteur] in words for words in failing), failing


def test_another_seed_is_not_compared_but_fails(root):
    failing = one_run(root, RECIPE, seed=1).failing

    assert len(MEASUREMENTS) == len(failing)
    assert all("seed was 0 when the baseline was recorded and is 1" in words for words in failing)


# --- Time ------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only where work is done or slept, with noise and bursts: no test depends on how busy we are."""

    def __init__(self, seed):
        self._numbers, self.now = random.Random(seed), 0.0
        self._slow = itertools.count()

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def work(self, seconds):
        burst = 3.0 if next(self._slow) % 5000 < 200 else 1.0  # a neighbour comes and goes
        self.now += seconds * burst * self._numbers.gauss(1, 0.03)


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Runs of generation alone: every product takes 0.1 ms, those of packed layers what `packed` says."""
    import torch

    make_base(tmp_path)

    class Benchmark:
        extra_info: dict = {}  # noqa: RUF012

        def pedantic(self, target, setup, rounds, warmup_rounds):
            for _ in range(rounds + warmup_rounds):
                setup()
                target()

    def run(seed, *, asleep=0.0, **given):
        clock = Clock(seed)

        def product(module, _):
            if holds(module, "codes"):
                clock.work(0.6e-3)
                clock.sleep(0.6e-3 * asleep)
            elif isinstance(module, torch.nn.Linear):
                clock.work(1e-3)

        monkeypatch.setattr(cpu_wait, "_COUNTED", "/nowhere")
        for module in (generation, cpu_wait):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
        hook = torch.nn.modules.module.register_module_forward_pre_hook(product)
        request = SimpleNamespace(getfixturevalue=lambda name: Benchmark())
        try:
            workbench = Workbench(options(tmp_path, RECIPE, new_tokens=8, **given))
            test = {"generation": lambda *of: efficiency.test_generation(*of, 1, "eager", request)}
            return measured(workbench, measurements=test)
        finally:
            hook.remove()

    return run


@pytest.mark.process
def test_a_method_that_sleeps_a_tenth_of_every_token_is_seen_and_noise_alone_is_not(timed):
    assert [] == timed(0, update=True)
    assert [] == timed(1)

    assert any("efficiency.decode_ms" in words and "regressed" in words for words in timed(1, asleep=0.1))


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_a_method_that_leaks_memory_with_every_run_is_seen(tmp_path, monkeypatch):
    import torch

    make_base(tmp_path)
    kept = []

    def leak(self, x):
        kept.append(torch.ones(2**17))  # half a MiB with every product
        return forward(self, x)

    def run(**given):
        workbench = Workbench(options(tmp_path, RECIPE, **given))

        def take(times=1):
            model = workbench.compressed(Recipe.parse(RECIPE)).model
            load = workbench.options.load(1)
            decode = lambda model: generation.Decoder(model, load).run()  # noqa: E731
            _, peaks, source = memory_process.measure(lambda: model, decode, loads=3)
            peak = max(1, round(median(peaks)))
            return memory.MemoryReading(peak_bytes=peak, model_bytes=1, stored_bytes=1, source=source), None

        return measured(workbench, measurements={"memory": lambda bench, recipe: bench.measure("memory", recipe, take)})

    forward = Linear.forward
    assert [] == run(update=True)
    assert [] == run(gate="strict")
    monkeypatch.setattr(Linear, "forward", leak)

    assert any("efficiency.peak_memory_mb" in words and "regressed" in words for words in run())
