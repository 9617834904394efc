"""The options of `pytest bench`: declared with their help, and read from the command line as checked `Options`."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.data.collections.chunking import Chunking
from bench.data.tasks.table import choose
from bench.errors import OptionError
from bench.machine import device as machine
from bench.measure.engines import environments
from bench.measure.judge import setup as judging
from bench.measure.judge.endpoint import Patience, Url
from bench.measure.rag.pipeline import Setup
from bench.report.escaping import shell
from bench.results.row import NATIVE
from bench.session import worker_place
from bench.session.options import Options
from bench.session.selection import select
from compression.checkpoints.tokens import reserved
from compression.files.strict_json import at_least

if TYPE_CHECKING:
    from bench.session.options import Options

_RECORDING = ("--update-baselines", "--force-update")


def options_of(config: pytest.Config, run: str | None = None) -> "Options":
    """The command line as checked options; `run` is the id of a run that was begun already.

    Raises:
        OptionError: a value is invalid.
        RecipeError: a recipe is invalid.
    """
    get = config.getoption
    _check_numbers(get)
    root, selection = config.invocation_params.dir, select(config)
    worker = worker_place.worker_of(config)
    device, shared = _placed(_device(get("--device")), worker)
    options = Options(
        base=get("--base"),
        recipes=selection.recipes,
        named=selection.named,
        refused=selection.refused,
        data=get("--data"),
        calibration=get("--calibration"),
        teacher=get("--teacher"),
        downstream=get("--downstream"),
        cache=get("--cache"),
        device=device,
        compute_dtype=get("--compute-dtype"),
        shared=shared,
        run=worker.run if worker else run,
        began=worker.began if worker else 0.0,
        seed=get("--seed"),
        gate=get("--gate"),
        against=get("--against"),
        baselines=get("--baselines") or root / "baselines",
        update=get("--update-baselines"),
        force_update=get("--force-update"),
        journal=worker_place.journal_of(config),
        resume=get("--resume") or bool(worker and worker.ray),
        runtimes=tuple(runtimes := asked_runtimes(config)),
        runtime_pythons=_pythons(runtimes, get("--runtime-python") or ()),
        runtime_dtype=get("--runtime-dtype"),
        runtime_devices=_runtime_devices(runtimes, get("--runtime-devices")),
        requests=get("--requests"),
        batch_sizes=tuple(asked_batch_sizes(config)),
        prompt_tokens=get("--prompt-tokens"),
        new_tokens=get("--max-new-tokens"),
        runs=get("--runs"),
        warmup=get("--warmup-runs"),
        tdp=get("--tdp"),
        protocol={"name": get("--protocol"), "samples": get("--samples"), "length": get("--length"),
                  "stride": get("--stride")},
        rag=_rag(config),
        judge=_judge(config),
        tasks=tuple(asked_tasks(config)),
        limit=get("--limit"),
        task_rows=get("--task-rows"),
        chat_template=get("--chat-template"),
        template=template_arguments(get("--chat-template-args")),
        allow_code_execution=get("--allow-code-execution"),
        command=shell(["pytest", *(a for a in config.invocation_params.args if a not in _RECORDING)]),
    )  # fmt: skip
    for size in options.batch_sizes:
        options.load(size)
    return options


def _check_numbers(get: Callable[[str], Any]) -> None:
    for name in ("--limit", "--task-rows"):
        if get(name) is not None:
            at_least(name, get(name), 1, OptionError, "; leave it out for no limit")
    for name in ("--runs", "--warmup-runs", "--samples", "--requests"):
        at_least(name, get(name), 0 if name == "--warmup-runs" else 1, OptionError)
    if (watts := get("--tdp")) is not None and not 0 < watts < math.inf:
        raise OptionError(f"--tdp must be a finite number of watts above 0, not {watts:g}; leave it out to detect it")
    at_least("--seed", get("--seed"), 0, OptionError)


def template_arguments(text: str | None) -> dict[str, Any]:
    """Those of `--chat-template-args`, a value being JSON or else a text. Raises OptionError for what are none.

    >>> template_arguments('enable_thinking=true,style=brief'), template_arguments('{"depth": 2}')
    ({'enable_thinking': True, 'style': 'brief'}, {'depth': 2})
    """
    if not text:
        return {}

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    found = value(text) if text.lstrip().startswith("{") else {
        name.strip(): value(given) for name, is_, given in (part.partition("=") for part in text.split(",")) if is_
    }  # fmt: skip
    whole = isinstance(found, dict) and (text.lstrip().startswith("{") or len(found) == len(text.split(",")))
    if not whole or not all(name.isidentifier() for name in found):
        raise OptionError(f"--chat-template-args {text}: give name=value separated by commas, each name once, or a "
                          'JSON object, such as enable_thinking=true or {"enable_thinking": true}')  # fmt: skip
    if wrong := sorted(reserved() & set(found)):
        raise OptionError(f"--chat-template-args {text}: {', '.join(wrong)} must be left out: the benchmarks set it")
    return found


def _rag(config: pytest.Config) -> Any:
    get = config.getoption
    chunking = {"by": get("--chunking"), "size": get("--chunk-size"), "overlap": get("--chunk-overlap")}
    given = {name: value for name, value in chunking.items() if value is not None}
    return Setup(
        dataset=get("--dataset-path"),
        documents=get("--documents"),
        questions=get("--num-questions"),
        seed=get("--seed"),
        retriever=get("--retriever"),
        encoder=get("--encoder"),
        index=get("--index"),
        top_k=get("--top-k"),
        threshold=get("--similarity-threshold"),
        chunking=Chunking(**given) if given else None,
        compare=get("--compare-no-rag") == "yes",
        seeds=get("--rag-seeds"),
        responses=get("--save-detailed-responses"),
        bertscore=get("--bertscore-encoder"),
    )


def _judge(config: pytest.Config) -> Any:
    def given(**options: str) -> dict[str, Any]:
        return {name: value for name, option in options.items() if (value := config.getoption(option)) is not None}

    patience = Patience(**given(timeout="--judge-timeout", attempts="--judge-attempts", first="--judge-wait"))
    addressed = config.getoption("--judge-url") is not None
    return judging.Setup(
        patience=patience,
        url=Url(config.getoption("--judge-url")) if addressed else None,  # in no variable: it may hold a key
        **given(
            model="--judge-model", local="--judge", samples="--judge-samples",
            concurrency="--judge-concurrency", cache="--judge-cache", decoding="--judge-decoding",
            new_tokens="--judge-new-tokens", questions="--num-questions", fluency="--fluency-model",
            encoder="--coherence-encoder",
        ),
    )  # fmt: skip


def asked_tasks(config: pytest.Config) -> list[Any]:
    """Those of `--tasks`. Raises OptionError for one that there is not."""
    return choose(config.getoption("--tasks"))


def asked_runtimes(config: pytest.Config) -> list[str]:
    """Those of `--runtime`, each once. Raises OptionError for one that there is not."""
    found = [each.strip() for each in str(config.getoption("--runtime")).split(",")]
    known = (NATIVE, *environments.ENGINES)
    if wrong := [each for each in found if each not in known]:
        raise OptionError(f"--runtime must be {', '.join(known)}, or several of them separated by commas, not "
                          f"{wrong[0]!r}")  # fmt: skip
    return list(dict.fromkeys(found))


def _pythons(runtimes: list[str], pairs: Sequence[str]) -> dict[str, Path]:
    """The Python of each engine that is asked for. Raises OptionError or EngineError where there is none."""
    named = environments.pythons(pairs)
    if unasked := sorted(set(named) - set(runtimes)):
        raise OptionError(f"--runtime-python {unasked[0]}=...: --runtime must name {unasked[0]} too")
    return {each: environments.python_of(each, named) for each in runtimes if each != NATIVE}


def _runtime_devices(runtimes: Sequence[str], devices: int) -> int:
    """Among how many devices engines divide a model. Raises OptionError where one of them cannot, or none is asked."""
    if devices < 1:
        raise OptionError(f"--runtime-devices must be at least 1, not {devices}")
    engines = [each for each in runtimes if each != NATIVE]
    unable = [each for each in engines if not environments.requirement(each).divides]
    if devices > 1 and (unable or not engines):
        able = ", ".join(name for name, each in environments.ENGINES.items() if each.divides)
        raise OptionError(
            f"--runtime-devices {devices}: models are divided by {able}, not by "
            f"{', '.join(unable) or NATIVE}; --runtime must name {able}, and may name {NATIVE}"
        )
    return devices


def asked_batch_sizes(config: pytest.Config) -> list[int]:
    """Those of `--batch-size`, each once. Raises OptionError for what is no list of them."""
    text = config.getoption("--batch-size")
    try:
        sizes = [int(part) for part in str(text).split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise OptionError(
            f"--batch-size must be whole numbers of at least 1, separated by commas (such as 1,2,4,8), not {text}"
        )
    return list(dict.fromkeys(sizes))


def asked_request_rates(config: pytest.Config) -> list[float]:
    """Those of `--request-rate`, each once. Raises OptionError for what is no list of them, and without an engine."""
    if (text := config.getoption("--request-rate")) is None:
        return []
    try:
        rates = [float(part) for part in str(text).split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise OptionError(f"--request-rate must be requests per second above 0, separated by commas, not {text}")
    if not set(asked_runtimes(config)) - {NATIVE}:
        raise OptionError(f"--request-rate {text}: --runtime must name an engine that takes requests, such as vllm")
    return list(dict.fromkeys(rates))


def may_have_cuda(config: pytest.Config) -> bool:
    """Without importing torch: whether a test in graph mode is worth collecting."""
    device = config.getoption("--device")
    return device.startswith("cuda") or (device == "auto" and os.path.exists("/dev/nvidiactl"))


def _device(text: str) -> str:
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda") or text.startswith("cpu:"):
        raise OptionError(f"--device must be auto, cpu, cuda or cuda:N, not {text}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {text}: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    return text


def _placed(device: str, worker: worker_place.Worker | None) -> tuple[str, str | None]:
    """The device of this process, and why it can take no times on it."""
    if worker is None or worker.ray or not device.startswith("cuda"):
        return worker_place.placed(device, worker, 0)
    import torch

    gpus = torch.cuda.device_count()
    here, shared = worker_place.placed(device, worker, gpus)
    kinds = {machine.fingerprint(f"cuda:{k}") for k in range(min(gpus, worker.count))} if device == "cuda" else {device}
    if len(kinds) > 1:
        raise OptionError(
            f"-n {worker.count}: the GPUs are of different kinds ({', '.join(sorted(kinds))}), and their rows cannot "
            "belong to one run; choose equal ones with CUDA_VISIBLE_DEVICES"
        )
    return here, shared
