"""What engines serve: the speed, memory and quality of exported checkpoints, base and compressed on the same engine."""

import pytest

from bench.data.tasks.table import SEED
from bench.gate import verdicts
from bench.machine import device
from bench.measure.engines.traffic import Traffic
from bench.measure.generation import Interleaved
from bench.measure.memory import MemoryReading
from bench.metrics import speed
from bench.metrics.tasks import score_with
from bench.metrics.traffic import TrafficReading
from bench.test_efficiency import _params
from bench.test_quality import _programs, _protocol, _template
from compression import Recipe, checkpoints
from compression.recipes.recipe import UNCOMPRESSED

BASE = Recipe()


@pytest.mark.efficiency
def test_served_generation(workbench, recipe, runtime, batch_size):
    options, load = workbench.options, workbench.options.load(batch_size)
    pair = None

    def take(times=verdicts.MORE[-1] if options.update else 1):
        nonlocal pair

        if pair is None:
            recipes = dict.fromkeys((BASE, recipe))
            pair = Interleaved([workbench.served.decoder(runtime, each, load) for each in recipes])
        pair.run(options.warmup + options.runs)
        pair.run(options.warmup + times * options.runs, seconds=verdicts.SECONDS)
        peak = device.peak_flops(options.device, workbench.base.model.dtype)
        return speed.readings(pair, load, warmup=options.warmup, peak_flops_per_s=peak.flops_per_s)

    asked = _params(load, **_runtime(workbench, runtime))
    workbench.measure("generation", recipe, take, asked, each=lambda r: r.each(), more=take,
                      notes=_notes(workbench, runtime, recipe))  # fmt: skip


@pytest.mark.efficiency
def test_served_traffic(workbench, recipe, runtime, request_rate):
    options = workbench.options
    round_of = {"requests": options.requests, "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
    pair = None

    def take(times=verdicts.MORE[-1] if options.update else 1):
        nonlocal pair

        if pair is None:
            traffic = Traffic(rate=request_rate, **round_of)
            recipes = dict.fromkeys((BASE, recipe))
            pair = Interleaved([workbench.served.traffic(runtime, each, traffic) for each in recipes])
        pair.run(options.warmup + options.runs)
        pair.run(options.warmup + times * options.runs, seconds=verdicts.SECONDS)
        *base, own = (TrafficReading(rounds=tuple(rounds[options.warmup :])) for rounds in pair.rounds)
        return own, base[0] if base else None

    asked = round_of | {"rate": request_rate, "batch": max(options.batch_sizes)}
    workbench.measure("traffic", recipe, take, asked | _runtime(workbench, runtime), each=lambda r: r.each(), more=take,
                      notes=_notes(workbench, runtime, recipe))  # fmt: skip


@pytest.mark.efficiency
def test_served_memory(workbench, recipe, runtime, batch_size):
    load = workbench.options.load(batch_size)

    def of(each):
        decoder = workbench.served.decoder(runtime, each, load)
        decoder.run()
        decoder.engine.memory()  # the peak of opening is forgotten
        decoder.run(1)
        found = decoder.engine.memory()
        return MemoryReading(
            peak_bytes=found.peak_bytes, model_bytes=found.anonymous_bytes,
            stored_bytes=checkpoints.size.stored_bytes(decoder.model), source=f"{found.source} of {runtime}, whole",
        )  # fmt: skip

    def take():
        base = workbench.base_reading(("served memory", runtime, load), lambda: of(BASE))
        return (base, None) if recipe.text == UNCOMPRESSED else (of(recipe), base)

    workbench.measure("memory", recipe, take, _params(load, **_runtime(workbench, runtime)),
                      notes=_notes(workbench, runtime, recipe))  # fmt: skip


def _likelihoods(workbench, runtime, recipe, protocol):
    return workbench.served.likelihoods(runtime, recipe, workbench.data, protocol)


@pytest.mark.quality
def test_served_perplexity(workbench, recipe, runtime):
    protocol, asked = _protocol(workbench)
    workbench.note_data("perplexity", workbench.data.source(protocol.split, what=protocol.what).digest)

    def take():
        base = _likelihoods(workbench, runtime, BASE, protocol).reading()
        if recipe.text == UNCOMPRESSED:
            return base, None
        return _likelihoods(workbench, runtime, recipe, protocol).reading(), base

    workbench.measure("perplexity", recipe, take, asked | _runtime(workbench, runtime),
                      notes=_notes(workbench, runtime, recipe))  # fmt: skip


@pytest.mark.quality
def test_served_divergence(workbench, recipe, runtime):
    if recipe.text == UNCOMPRESSED:
        pytest.skip("the base does not differ from itself")
    protocol, asked = _protocol(workbench)
    workbench.note_data("divergence", workbench.data.source(protocol.split, what=protocol.what).digest)

    def take():
        base = _likelihoods(workbench, runtime, BASE, protocol)
        found = _likelihoods(workbench, runtime, recipe, protocol).reading(base).divergence
        return found, found.of_itself

    workbench.measure("divergence", recipe, take, asked | _runtime(workbench, runtime),
                      notes=_notes(workbench, runtime, recipe))  # fmt: skip


@pytest.mark.quality
def test_served_task(workbench, recipe, runtime, task):
    options = workbench.options

    def of(each):
        scorer = workbench.served.scorer(runtime, each, SEED)
        return score_with(scorer, workbench.task(task), limit=options.limit, chat=options.chat_template)

    def take():
        base = workbench.base_reading(("served task", runtime, task), lambda: of(BASE))
        return (base, None) if recipe.text == UNCOMPRESSED else (of(recipe), base)

    filtered = None if task.filter == "none" else task.filter
    asked = {"task": task.name, "shots": task.shots, "score": task.metric, "filter": filtered, "limit": options.limit,
             "temperature": task.temperature or None, "chat": options.chat_template or None,
             "programs": _programs(options, [task]), "template": _template(options)}  # fmt: skip
    workbench.measure("task", recipe, take, asked | _runtime(workbench, runtime),
                      notes=_notes(workbench, runtime, recipe))  # fmt: skip


def _runtime(workbench, runtime):
    """Part of the key of a row: the engine, and the dtype that it was asked for."""
    return {"runtime": runtime, "dtype": workbench.served.dtype(runtime)}


def _notes(workbench, runtime, recipe):
    def notes(reading):
        return "ok", getattr(reading, "remark", None), workbench.served.facts(runtime, recipe)

    return notes
