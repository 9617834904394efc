"""Efficiency: size, speed, memory, energy, and cost of compression."""

import dataclasses

import pytest

from bench.gate import verdicts
from bench.machine import device
from bench.measure import memory
from bench.metrics import energy, speed
from bench.results.bases import short
from bench.results.row import key_of
from compression import checkpoints
from compression.recipes.recipe import UNCOMPRESSED

pytestmark = pytest.mark.efficiency


@pytest.mark.ordering
def test_size(workbench, recipe):
    workbench.measure_size(recipe)


def test_cost(workbench, recipe):
    workbench.measure("cost", recipe, lambda: (workbench.compressed(recipe).cost, None))


def test_generation(workbench, recipe, batch_size, mode, request):
    if mode == "graph" and not workbench.options.device.startswith("cuda"):
        pytest.skip(f"CUDA graphs need CUDA; the device is {workbench.options.device}")
    options, load = workbench.options, workbench.options.load(batch_size)
    warmup, runs = (0, 1) if options.shared else (options.warmup, options.runs)  # without times one round is enough
    pair = None

    def take(times=verdicts.MORE[-1] if options.update else 1):
        nonlocal pair

        if pair is None:
            pair = workbench.interleaved(recipe, load, mode)
            benchmark = request.getfixturevalue("benchmark")  # not before: a resumed measurement would leave it unused
            # pytest-benchmark keeps the history of the compressed side; the base's round before each is its set-up
            source = workbench.source
            facts = {"base": source.label, "base_hash": source.digest, "device": workbench.fingerprint, "mode": mode}
            benchmark.extra_info.update(facts, recipe=recipe.text, **dataclasses.asdict(load))
            base = f"{source.label} ({short(source.digest)})"
            benchmark.group = f"{base} on {facts['device']}, {key_of('generation', _params(load, mode=mode))}"
            benchmark.pedantic(
                lambda: pair.round_of(-1),
                setup=lambda: [pair.round_of(i) for i in range(len(pair.decoders) - 1)] and None,
                rounds=runs,
                warmup_rounds=warmup,
            )
        pair.run(warmup + runs)
        pair.run(warmup + times * runs, seconds=verdicts.SECONDS)
        peak = device.peak_flops(options.device, workbench.base.model.dtype)
        return speed.readings(pair, load, warmup=warmup, peak_flops_per_s=peak.flops_per_s)

    workbench.measure("generation", recipe, take, _params(load, mode=mode), each=lambda r: r.each(), more=take)


def test_against(workbench, recipe, batch_size, mode, against):
    if mode == "graph" and not workbench.options.device.startswith("cuda"):
        pytest.skip(f"CUDA graphs need CUDA; the device is {workbench.options.device}")
    options, load = workbench.options, workbench.options.load(batch_size)
    pair = None

    def take(times=1):
        nonlocal pair
        if pair is None:
            pair = workbench.beside(recipe, load, mode)
        pair.run(times * options.runs, seconds=verdicts.SECONDS)
        return tuple(speed.GenerationReading(rounds=tuple(r), flops=1, peak_flops_per_s=1.0) for r in pair.rounds)

    params = _params(load, mode=mode, commit=workbench.against.name)
    workbench.measure("against", recipe, take, params, each=lambda r: r.each(), more=take)


def test_memory(workbench, recipe, batch_size):
    load = workbench.options.load(batch_size)

    def take(times=1):
        def of_base():
            target = workbench.options.base
            return _peak(workbench, workbench.base, load, memory.ChildSpec, times, kind="base", target=target)

        base = workbench.base_reading(("memory", load), of_base)
        if recipe.text == UNCOMPRESSED:
            return base, None
        folder = str(workbench.artefact_folder(recipe)) if workbench.options.device == "cpu" else ""
        model = workbench.compressed(recipe)
        return _peak(workbench, model, load, memory.ChildSpec, times, kind="artefact", target=folder), base

    workbench.measure(
        "memory",
        recipe,
        take,
        _params(load),
        each=lambda r: r.each(),
        notes=lambda r: ("ok", None, r.source),
        more=take,
    )


def test_energy(workbench, recipe, batch_size):
    options, load = workbench.options, workbench.options.load(batch_size)

    def take(times=1):
        decoders = workbench.interleaved(recipe, load, "eager").decoders
        for decoder in decoders:
            decoder.run()
        works = [lambda decoder=decoder: decoder.run().tokens for decoder in decoders]
        *base, reading = energy.measure_in_turn(
            works, device=options.device, tdp=options.tdp,
            min_seconds=times * energy.SECONDS, windows=times * energy.WINDOWS,
        )  # fmt: skip
        return reading, base[0] if base else None

    def notes(reading):
        return "estimated" if reading.estimated else "ok", reading.note or None, reading.source

    workbench.measure("energy", recipe, take, _params(load), each=lambda r: r.each(), notes=notes, more=take)


def _peak(workbench, model, load, spec, times, **target):
    stored = checkpoints.size.stored_bytes(model.model)
    if workbench.options.device != "cpu":
        return memory.peak_on_cuda(
            lambda: workbench.decoder(model, load).run(),
            model=model.model, device=workbench.options.device, stored_bytes=stored,
        )  # fmt: skip
    import torch

    loads = times * (memory.LOADS if stored < memory.SMALL else 1)
    child = spec(load=load, threads=torch.get_num_threads(), loads=loads, **target)
    return memory.peak_in_child(child, stored_bytes=stored)


def _params(load, **more):
    return {"batch": load.batch_size, "prompt_tokens": load.prompt_tokens, "new_tokens": load.new_tokens, **more}
