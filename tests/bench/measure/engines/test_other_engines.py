"""vLLM and llama.cpp, each in an environment of its own: `tox -e engines` makes these and runs this file."""

import _ctypes
import math
import os
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from checkpoints import says, transformers_model
from engines import wait_until_gone
from processes import completed

import compression
from bench.errors import EngineError
from bench.measure.answering import Sampling, distribution
from bench.measure.engines.engine import Drawn, Engine, Options
from bench.measure.engines.environments import python_of

pytestmark = pytest.mark.process

SIZES = {  # heads of 32, as vLLM wants, and weights so large that tokens are not all alike
    "hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
PROMPTS = [[1, 5, 9, 13, 40, 7], [3, 2, 1], list(range(20))]
OPTIONS = {"sequences": 3, "max_length": 40}
NEAR = 1e-3  # nat; both compute in fp32, but llama.cpp keeps keys and values in fp16
NEAR_IN_FP16 = 5e-2  # nat; the numbers of fp16 around 4, where logits are, have steps of 4e-3


def installed(name):
    try:
        return python_of(name)
    except EngineError as error:
        pytest.skip(str(error))


def started(name, model, log, **options):
    return Engine.start(name, model, python=installed(name), log=log, options=Options(**OPTIONS | options))


@pytest.fixture(scope="module")
def model():
    return transformers_model("LlamaForCausalLM", **SIZES).eval()


@pytest.fixture(scope="module")
def checkpoint_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A GGUF file in F32, and the model that it is of."""
    from gguf_files import write

    path = tmp_path_factory.mktemp("engines") / "tiny.gguf"
    model = write(path, kind="F32", change=lambda writer: writer.add_tokenizer_model("no_vocab"))
    return path, model.eval()


@pytest.fixture(scope="module", params=["vllm", "llama.cpp"])
def opened(request, tmp_path_factory):
    """An engine, and the model that it opened."""
    log = tmp_path_factory.mktemp("log") / "engine.log"
    if request.param == "vllm":
        source, model, dtype = request.getfixturevalue("checkpoint_folder"), request.getfixturevalue("model"), "float32"
    else:
        (source, model), dtype = request.getfixturevalue("gguf_file"), "auto"
    with started(request.param, source, log, dtype=dtype) as engine:
        yield engine, model


@torch.inference_mode()
def test_log_probabilities_are_those_of_a_forward_pass_here(opened):
    engine, model = opened
    for prompt, scores in zip(PROMPTS, engine.logprobs(PROMPTS, top=3), strict=True):
        ids = torch.tensor(prompt)
        expected = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)

        assert expected.gather(1, ids[1:, None])[:, 0].tolist() == pytest.approx(scores.logprobs, abs=NEAR)
        best = expected.topk(3).values.flatten().tolist()
        assert best == pytest.approx([value for row in scores.top for _, value in row], abs=NEAR)
        for row, pairs in zip(expected, scores.top, strict=True):
            assert row[[id for id, _ in pairs]].tolist() == pytest.approx([value for _, value in pairs], abs=NEAR)


@torch.inference_mode()
def test_every_generated_token_is_the_likeliest_here_after_those_before(opened):
    engine, model = opened
    for prompt, found in zip(PROMPTS, engine.generate(PROMPTS, 12), strict=True):
        logits = model(torch.tensor([[*prompt, *found.ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        short = logits.amax(-1) - logits[torch.arange(12), list(found.ids)]

        assert float(short.max()) < NEAR
        assert 12 == len(set(found.arrivals_s))


def test_the_same_request_has_the_same_answer(opened):
    engine, _ = opened

    assert engine.logprobs(PROMPTS, top=2) == engine.logprobs(PROMPTS, top=2)
    assert 1 == len({tuple(each.ids for each in engine.generate(PROMPTS, 12)) for _ in range(3)})


def test_requests_that_come_while_others_are_computed_have_the_same_tokens_behind_their_arrival(opened):
    engine, _ = opened
    if engine.facts.engine != "vllm":
        with pytest.raises(EngineError, match="arrive"):
            engine.arrive(PROMPTS, [0.0, 0.0, 0.0], 12)
        return
    prompts, arrivals = [*PROMPTS, *PROMPTS], [0.0, 0.001, 0.002, 0.3, 0.3, 1.0]  # six, three of which at once

    found = engine.arrive(prompts, arrivals, 12)

    alone = [engine.generate([prompt], 12)[0].ids for prompt in PROMPTS]
    assert [*alone, *alone] == [each.ids for each in found]
    assert all(each.arrivals_s[0] > arrival for each, arrival in zip(found, arrivals, strict=True))
    assert found[-1].arrivals_s[0] > 1.0 > found[0].arrivals_s[-1]


def test_tokens_are_drawn_by_their_seeds_of_each_prompt_by_its_own(opened):
    engine, _ = opened

    def drawn(*seeds, **how):
        return [each.ids for each in engine.generate(PROMPTS, 12, sampling=Drawn(**how, seeds=seeds))]

    once = drawn(1, 2, 3, temperature=1.0)
    assert once == drawn(1, 2, 3, temperature=1.0)
    assert all(one != two for one, two in zip(once, drawn(4, 5, 6, temperature=1.0), strict=True))
    assert once[1:] == drawn(9, 2, 3, temperature=1.0)[1:]
    assert [each.ids for each in engine.generate(PROMPTS, 12)] == drawn(1, 2, 3, temperature=1e-3)
    assert drawn(1, 2, 3, temperature=1.0, top_p=1e-6) == drawn(1, 2, 3, temperature=1e-3)


@torch.inference_mode()
def test_drawn_tokens_have_the_distribution_of_a_forward_pass_here(opened):
    engine, model = opened
    sampling = Sampling(temperature=0.7, top_p=0.8, repetition_penalty=1)
    logits = model(torch.tensor([PROMPTS[0]]), use_cache=False).logits[0, -1:]
    expected = distribution(logits, sampling)[0]
    found = torch.zeros_like(expected)
    rounds = 200
    for place in range(rounds):
        seeds = tuple(range(3 * place, 3 * place + 3))
        for each in engine.generate([PROMPTS[0]] * 3, 1, sampling=Drawn(temperature=0.7, top_p=0.8, seeds=seeds)):
            found[each.ids[0]] += 1 / (3 * rounds)

    assert 2 < int((expected > 0).sum()) < len(expected)
    assert 0 == float(found[expected == 0].sum())
    assert float((found - expected).abs().max()) < 4 * math.sqrt(0.25 / (3 * rounds))


def test_a_stop_token_ends_its_own_sequence_only_and_belongs_to_it(opened):
    engine, _ = opened
    whole = [each.ids for each in engine.generate(PROMPTS, 10)]
    stop = whole[0][2]
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in whole]

    found = [each.ids for each in engine.generate(PROMPTS, 10, stop_ids=[stop])]
    assert len(expected[0]) == len(found[0]) == whole[0].index(stop) + 1
    assert expected == found
    assert whole == [each.ids for each in engine.generate(PROMPTS, 10, stop_ids=[stop], ignore_eos=True)]


def test_a_prompt_may_be_as_long_as_the_engine_was_opened_for(opened):
    engine, _ = opened

    assert 39 == len(engine.logprobs([list(range(40))])[0].logprobs)


def test_memory_and_facts_are_told(opened):
    engine, model = opened

    weights = 4 * sum(each.numel() for each in model.parameters())
    assert weights < engine.memory().anonymous_bytes
    assert engine.facts.version and model.config.vocab_size == engine.facts.vocabulary
    assert 1 == engine.facts.flags["threads"]


def test_an_answer_follows_an_error(opened):
    engine, _ = opened
    before = engine.options
    engine.options = Options(**OPTIONS | {"max_length": 10**6})
    try:
        with pytest.raises(EngineError, match="could not do what it was asked"):
            engine.generate([[1] * 100], 200)
    finally:
        engine.options = before

    assert 4 == len(engine.generate([[1, 2]], 4)[0].ids)


@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
def test_what_is_no_model_is_an_error_in_the_engines_words(name, tmp_path):
    path = tmp_path / ("file.gguf" if name == "llama.cpp" else "folder")
    path.write_bytes(b"no model" * 100) if name == "llama.cpp" else path.mkdir()

    with pytest.raises(EngineError, match=says(f"the process of {name}", str(path), "its log is in")):
        started(name, path, tmp_path / "log")

    assert (tmp_path / "log").read_text()


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@torch.inference_mode()
def test_llama_cpp_scales_positions_as_they_are_written(tmp_path, rope):
    prompt = torch.arange(40)[None] * 79 % 48
    default = {"rope_type": "default", "rope_theta": 1e4}
    expected, out = [], tmp_path / "out"
    for each in (default, rope):
        sizes = SIZES | {"initializer_range": 0.02, "max_position_embeddings": 512, "rope_parameters": dict(each)}
        model = transformers_model("LlamaForCausalLM", **sizes).eval()
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(12)  # attention that depends on positions
        logprobs = model(prompt, use_cache=False).logits[0, :-1].log_softmax(-1)
        expected.append(logprobs.gather(1, prompt[0, 1:, None])[:, 0])
    model.save_pretrained(tmp_path / "base")
    compression.compress(str(tmp_path / "base"), "fp16").save(out, "gguf")

    with started("llama.cpp", out / "model.gguf", tmp_path / "log", dtype="auto") as engine:
        (scores,) = engine.logprobs(prompt.tolist())

    unscaled, scaled = ((torch.tensor(scores.logprobs) - each).abs().mean() for each in expected)
    assert float(scaled) < NEAR < 20 * NEAR < float(unscaled)


def test_llama_cpp_runs_from_the_library_that_is_named(gguf_file, tmp_path, monkeypatch):
    python = installed("llama.cpp")
    code = "import xllamacpp; print(xllamacpp.xllamacpp.__file__)"
    inside = Path(completed([python, "-c", code], check=True).stdout.strip())
    monkeypatch.setenv("COMPRESSION_LLAMA_CPP_LIBRARY", str(inside))

    with started("llama.cpp", gguf_file[0], tmp_path / "log", dtype="auto") as engine:
        assert f"library {inside}" == engine.facts.version
        assert 3 == len(engine.logprobs([[1, 2, 3, 4]])[0].logprobs)


@pytest.mark.parametrize("exists", [False, True])
def test_what_is_no_library_of_llama_cpp_is_an_error_in_words(gguf_file, tmp_path, monkeypatch, exists):
    """A file that is not there, and a library of something else."""
    named = _ctypes.__file__ if exists else str(tmp_path / "libllama.so")
    monkeypatch.setenv("COMPRESSION_LLAMA_CPP_LIBRARY", named)

    with pytest.raises(EngineError, match=says(f"{named} must be a shared library of llama.cpp", "its log is in")):
        started("llama.cpp", gguf_file[0], tmp_path / "log", dtype="auto")


def test_llama_cpp_takes_no_other_dtype_than_that_of_the_file(gguf_file, tmp_path):
    with pytest.raises(EngineError, match="dtype must be auto, not float32"):
        started("llama.cpp", gguf_file[0], tmp_path / "log", dtype="float32")


@torch.inference_mode()
def test_vllm_divides_one_model_between_two_processes(model, checkpoint_folder, tmp_path):
    ids = torch.tensor(PROMPTS[2])
    expected = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    with started("vllm", checkpoint_folder, tmp_path / "log", dtype="float32", devices=2) as engine:
        [scores] = engine.logprobs([PROMPTS[2]])
        memory, pid = engine.memory(), engine.pid
        processes = [each.pid for each in psutil.process_iter() if os.getpgid(each.pid) == pid]

    assert expected.tolist() == pytest.approx(scores.logprobs, abs=NEAR)
    assert 2 == engine.facts.flags["tensor_parallel_size"] and 3 <= len(processes)
    assert "processes" in memory.source
    for each in processes:
        wait_until_gone(each)


def test_a_model_that_vllm_cannot_divide_is_an_error_in_its_words(checkpoint_folder, tmp_path):
    with pytest.raises(EngineError, match="must be divisible by tensor parallel size"):
        started("vllm", checkpoint_folder, tmp_path / "log", dtype="float32", devices=3)


@pytest.mark.parametrize(("text", "format"), [
    ("fp16", None), ("gptq(symmetric=true,group_size=32)", "gptq"), ("awq(group_size=32)", "awq"),
])  # fmt: skip
@torch.inference_mode()
def test_vllm_reads_what_this_package_writes_and_computes_the_same(tmp_path, text, format):
    calibration = torch.randint(48, (16, 32), generator=torch.Generator().manual_seed(0))
    transformers_model("LlamaForCausalLM", dtype=torch.float16, **SIZES).save_pretrained(tmp_path / "in")
    compressed = compression.compress(str(tmp_path / "in"), text, calibration=calibration)
    compressed.save(tmp_path / "out", **{} if format is None else {"format": format})
    ids = torch.tensor(PROMPTS[2])

    def own(model):
        logits = model.float()(ids[None], use_cache=False).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()

    with started("vllm", tmp_path / "out", tmp_path / "log") as engine:
        [scores] = engine.logprobs([PROMPTS[2]])

    assert (format or "None") in engine.facts.flags["quantization"]
    expected = own(compressed.model)
    assert numpy.abs(scores.logprobs - expected).max() < NEAR_IN_FP16
    if format is not None:  # and what rounding did to the model is far more
        before = own(compression.open_base(str(tmp_path / "in")).model)
        assert numpy.abs(before - expected).max() > 10 * NEAR_IN_FP16
