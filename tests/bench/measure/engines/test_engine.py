"""transformers as an engine, in a process of its own: the same numbers as in this one, and what can go wrong."""

import importlib
import math
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import says
from engines import misbehaving, wait_until_gone
from processes import python

import compression
from bench.errors import EngineError, NotAvailable, OptionError
from bench.measure.answering import Sampling, distribution, seed_of
from bench.measure.engines import processes
from bench.measure.engines.engine import Continuation, Drawn, Engine, Options
from bench.measure.engines.scorer import EngineScorer
from compression.checkpoints.base import byte_tokenizer

PROMPTS = [[1, 5, 9, 13, 40, 7], [3, 2, 1], list(range(20))]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "engine.log"


@pytest.fixture(scope="module")
def engine(saved, log):
    with Engine.start("transformers", saved, python=sys.executable, options=Options(sequences=3, max_length=40),
                      log=log) as started:  # fmt: skip
        yield started


@pytest.fixture(scope="module")
def model(saved):
    return compression.open_base(str(saved)).model


def greedy(model, prompt, count):
    """Slow and obvious: the whole text anew for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@torch.inference_mode()
def test_log_probabilities_are_those_of_a_forward_pass_here(engine, model):
    for prompt, scores in zip(PROMPTS, engine.logprobs(PROMPTS, top=3), strict=True):
        ids = torch.tensor(prompt)
        expected = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        best = expected.topk(3)

        # the same operations of fp32 in another process
        assert expected.gather(1, ids[1:, None])[:, 0].tolist() == pytest.approx(scores.logprobs, abs=1e-5)
        assert best.indices.tolist() == [[id for id, _ in row] for row in scores.top]
        assert best.values.flatten().tolist() == pytest.approx([x for row in scores.top for _, x in row], abs=1e-5)


def test_without_top_tokens_only_those_of_the_text_are_scored(engine):
    [scores] = engine.logprobs([[4, 5, 6]])

    assert ((), ()) == scores.top
    assert scores.logprobs == engine.logprobs([[4, 5, 6]], top=1)[0].logprobs


@torch.inference_mode()
def test_generation_is_greedy_of_a_prompt_alone_and_of_a_batch_of_unequal_ones(engine, model):
    together = engine.generate(PROMPTS, 12)

    for prompt, found in zip(PROMPTS, together, strict=True):
        assert greedy(model, prompt, 12) == found.ids
        assert [found.ids] == [each.ids for each in engine.generate([prompt], 12)]


def test_every_token_has_a_time_and_those_of_a_batch_arrive_together(engine):
    first, second, _ = engine.generate(PROMPTS, 8)

    assert 8 == len(first.arrivals_s) == len(set(first.arrivals_s))
    assert list(first.arrivals_s) == sorted(first.arrivals_s)
    assert all(one < two for one, two in zip(second.arrivals_s, first.arrivals_s[1:], strict=False))


def test_a_stop_token_ends_its_own_sequence_only_and_belongs_to_it(engine):
    whole = [each.ids for each in engine.generate(PROMPTS, 10)]
    stop = whole[0][2]
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in whole]

    assert expected == [each.ids for each in engine.generate(PROMPTS, 10, stop_ids=[stop])]
    assert whole == [each.ids for each in engine.generate(PROMPTS, 10, stop_ids=[stop], ignore_eos=True)]


def test_tokens_are_drawn_by_their_seeds(engine):
    def drawn(*seeds, **how):
        return [each.ids for each in engine.generate(PROMPTS, 12, sampling=Drawn(**how, seeds=seeds))]

    once = drawn(1, 2, 3, temperature=1.0)
    assert once == drawn(1, 2, 3, temperature=1.0)
    assert once != drawn(4, 5, 6, temperature=1.0)
    assert [each.ids for each in engine.generate(PROMPTS, 12)] == drawn(1, 2, 3, temperature=1e-3)
    assert drawn(1, 2, 3, temperature=1.0, top_p=1e-6) == drawn(1, 2, 3, temperature=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told by Linux alone")
def test_memory_counts_the_weights_and_its_peak_begins_anew_with_every_reading(engine, model):
    engine.memory()
    now = engine.memory()
    engine.logprobs(PROMPTS)

    assert 4 * sum(each.numel() for each in model.parameters()) < now.anonymous_bytes <= now.peak_bytes
    assert "RssAnon" in now.source


def test_facts_name_versions_flags_and_the_python(engine):
    import transformers

    facts = engine.facts
    assert ("transformers", transformers.__version__) == (facts.engine, facts.version)
    assert (torch.__version__, sys.executable) == (facts.torch, facts.python)
    assert 1 == facts.flags["threads"] and "torch.float32" == facts.flags["dtype_of_weights"]
    assert facts.load_s > 0


def test_two_engines_of_one_seed_say_the_same(engine, saved, tmp_path):
    with Engine.start("transformers", saved, python=sys.executable, log=tmp_path / "log",
                      options=Options(sequences=3, max_length=40)) as other:  # fmt: skip
        assert engine.logprobs(PROMPTS, top=2) == other.logprobs(PROMPTS, top=2)
        ids = [[each.ids for each in one.generate(PROMPTS, 8)] for one in (engine, other)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(("ask", "words"), [
    (lambda e: e.logprobs([]), "number of prompts must be at least 1, not 0"),
    (lambda e: e.logprobs([[1]]), "length of a prompt must be at least 2, not 1"),
    (lambda e: e.logprobs([[1, 2]], top=-1), "top must be at least 0, not -1"),
    (lambda e: e.logprobs([[1, 10**6]]), "must be from 0 to"),
    (lambda e: e.logprobs([[1] * 41]), "at most 40 tokens, not 41 and 0 new ones"),
    (lambda e: e.generate([[1] * 31], 10), "at most 40 tokens, not 31 and 10 new ones"),
    (lambda e: e.generate([[1]] * 4, 2), "at most 3 prompts, not 4"),
    (lambda e: e.generate([[1]], 0), "new_tokens must be at least 1, not 0"),
    (lambda e: e.generate([[1]], 1, stop_ids=[-1]), "must be from 0 to"),
    (lambda e: e.generate([[1]], 1, sampling=Drawn(temperature=1, seeds=(1, 2))), "a seed for each of 1 prompts"),
    (lambda e: Drawn(temperature=0, seeds=(1,)), "temperature must be above 0 and finite, not 0; None is greedy"),
    (lambda e: Drawn(temperature=1, top_p=1.5, seeds=(1,)), "top_p must be above 0 and at most 1, not 1.5"),
    (lambda e: Drawn(temperature=1, seeds=(-1,)), "a seed must be at least 0, not -1"),
])  # fmt: skip
def test_what_an_engine_cannot_be_asked_is_refused_before_it_is_asked(engine, ask, words):
    with pytest.raises(OptionError, match=words):
        ask(engine)


@pytest.mark.parametrize(
    "wrong", [{"dtype": "int4"}, {"threads": 0}, {"max_length": 1}, {"sequences": 0}, {"devices": 0}]
)
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(OptionError, match=f"{next(iter(wrong))} must be "):
        Options(**wrong)


def test_an_engine_that_divides_no_model_is_refused_several_devices(saved, tmp_path):
    with pytest.raises(OptionError, match="devices must be 1 for transformers, not 2: models are divided by vllm"):
        Engine.start("transformers", saved, log=tmp_path / "log", options=Options(devices=2))


def test_a_folder_that_is_no_checkpoint_is_an_error_in_the_engines_words_with_the_log_kept(tmp_path):
    log = tmp_path / "engine.log"

    with pytest.raises(EngineError, match=says("the process of transformers", str(tmp_path), str(log))):
        Engine.start("transformers", tmp_path, python=sys.executable, log=log)

    assert "Traceback" in log.read_text()


def test_code_beside_the_weights_is_not_run(folder, tmp_path):
    from checkpoints import rewrite

    witness = tmp_path / "it ran"
    (folder / "theirs.py").write_text(f"open({str(witness)!r}, 'w')")
    rewrite(folder / "config.json", model_type="theirs", auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM":
                                                                   "theirs.M"})  # fmt: skip

    with pytest.raises(EngineError):
        Engine.start("transformers", folder, python=sys.executable, log=tmp_path / "log")

    assert not witness.exists()


def test_an_engine_that_is_killed_is_an_error_that_says_so(saved, tmp_path):
    with Engine.start("transformers", saved, python=sys.executable, log=tmp_path / "log") as engine:
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"the process of transformers must answer, but was killed by SIGKILL"):
            engine.logprobs(PROMPTS)


def test_an_engine_that_is_not_installed_is_an_error_with_the_command_that_installs_it(saved, tmp_path):
    import venv

    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"

    with pytest.raises(EngineError, match=says("must have the module transformers", f"{python} -m pip install")):
        Engine.start("transformers", saved, python=python, log=tmp_path / "log")
    with pytest.raises(OptionError, match=r"one of transformers, vllm, llama\.cpp, not 'sglang'"):
        Engine.start("sglang", saved, log=tmp_path / "log")


# --- Sampled answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.8), (2.0, 0.5)])
def test_what_is_drawn_from_the_logits_of_llama_cpp_has_the_distribution_that_is_drawn_from_here(
    monkeypatch, temperature, top_p
):
    monkeypatch.syspath_prepend(processes.__path__[0])
    chooser = importlib.import_module("llama_cpp_process").chooser
    logits = torch.tensor([2.0, 1.5, -1.0, 0.0, 1.0, -3.0])
    expected = distribution(logits[None], Sampling(temperature=temperature, top_p=top_p, repetition_penalty=1))[0]

    draw = chooser({"temperature": temperature, "top_p": top_p, "seeds": [0, 1]})
    drawn = [draw(k % 2, logits.numpy()) for k in range(4000)]

    shares = torch.bincount(torch.tensor(drawn), minlength=6) / len(drawn)
    assert float((shares - expected).abs().max()) < 4 * math.sqrt(0.25 / len(drawn))
    assert 0 == float(shares[expected == 0].sum())
    assert 0 == chooser(None)(0, logits.numpy())


class Asked:
    """Stands for an engine: what it was asked, and a token for each prompt."""

    options = Options(sequences=2, max_length=40)

    def __init__(self):
        self.sampling = []

    def generate(self, prompts, new_tokens, *, stop_ids, sampling):
        self.sampling.append(sampling)
        return [Continuation(ids=(5,) * new_tokens, arrivals_s=(0.0,) * new_tokens) for _ in prompts]


def test_the_prompts_of_a_task_have_seeds_of_their_own_whatever_batch_they_are_in(model):
    asked = Asked()
    scorer = EngineScorer(asked, byte_tokenizer(), model.config, seed=7)

    scorer.answer_all([[1, 2]] * 3, 4, [], Sampling(temperature=0.6, top_p=0.95, repetition_penalty=1))
    scorer.answer_all([[1, 2]], 4, [], None)

    seeds = [seed_of(7, place) for place in range(3)]
    expected = [Drawn(temperature=0.6, top_p=0.95, seeds=tuple(each)) for each in (seeds[:2], seeds[2:])]
    assert [*expected, None] == asked.sampling and 3 == len(set(seeds))


def test_a_repetition_penalty_is_not_available(model):
    with pytest.raises(NotAvailable, match="repetition penalty"):
        EngineScorer(Asked(), byte_tokenizer(), model.config).answer_all([[1]], 1, [], Sampling())


# --- The conversation -------------------------------------------------------------------------------------------------

RIGHT = """
import time
class Model:
    def logprobs(self, prompts, top):
        print("a library greets")
        for prompt in prompts:
            yield prompt, [-1.0] * (len(prompt) - 1), [[[3, -0.5]] * top] * (len(prompt) - 1)
    def generate(self, prompts, new_tokens, stop_ids, sampling):
        for _ in range(new_tokens):
            yield from ((number, 7, time.perf_counter()) for number in range(len(prompts)))
"""


def test_what_libraries_print_goes_to_the_log_and_is_no_answer(tmp_path):
    with misbehaving(tmp_path, RIGHT) as engine:
        assert (-1.0, -1.0) == engine.logprobs([[1, 2, 3]], top=1)[0].logprobs
        assert (7, 7) == engine.generate([[1]], 2)[0].ids
        assert "a library greets" in engine.log.read_text()


def test_an_error_inside_comes_in_words_its_traceback_is_in_the_log_and_the_engine_lives(tmp_path):
    broken = RIGHT.replace('print("a library greets")', 'raise MemoryError("no room for logits")')

    with misbehaving(tmp_path, broken) as engine:
        with pytest.raises(EngineError, match=says("MemoryError: no room for logits", str(engine.log))):
            engine.logprobs([[1, 2, 3]])

        assert "Traceback" in engine.log.read_text()
        assert (7,) == engine.generate([[1]], 1)[0].ids


def test_a_process_is_told_how_tokens_are_drawn_and_nothing_where_they_are_greedy(tmp_path):
    said = RIGHT.replace("for _ in range(new_tokens)", "print(sampling)\n        for _ in range(new_tokens)")

    with misbehaving(tmp_path, said) as engine:
        engine.generate([[1], [2]], 1, sampling=Drawn(temperature=0.5, top_p=0.9, seeds=(3, 4)))
        engine.generate([[1]], 1)

        assert "{'temperature': 0.5, 'top_p': 0.9, 'seeds': [3, 4]}\nNone\n" == engine.log.read_text()


@pytest.mark.parametrize(("change", "ask", "words"), [
    (("yield prompt,", "yield prompt[::-1],"), "logprobs", "for the 3 tokens that it was asked"),
    (("yield prompt,", "yield [0, *prompt],"), "logprobs", "but computed 4 other ones"),
    (("[-1.0] *", "[-1.0, -1.0] *"), "logprobs", "2 log-probabilities with 1 tokens each, but gave 4"),
    (("]] * top]", "]] * 2]"), "logprobs", r"with 1 tokens each, but gave 2 with \[2\]"),
    (("[-1.0]", "[0.5]"), "logprobs", "finite log-probabilities of at most 0, but gave 0.5"),
    (("[-1.0]", "[float('nan')]"), "logprobs", "finite log-probabilities of at most 0, but gave nan"),
    (("[-1.0]", "['x']"), "logprobs", "tokens, logprobs and top, but: ValueError"),
    (("in prompts:", "in prompts[1:]:"), "logprobs", "must answer 1 scores, but gave 0"),
    (("(number, 7,", "(number, 10,"), "generate", "tokens from 0 to 9, but gave"),
    (("(number, 7,", "(number, 7.0,"), "generate", "tokens from 0 to 9, but gave"),
    (("range(new_tokens)", "range(new_tokens - 1)"), "generate", r"3 tokens, .*but gave 2: \(7, 7\)"),
    (("range(new_tokens)", "range(0)"), "generate", r"3 tokens, .*but gave 0"),
    (("(number, 7,", "(number, 5,"), "generate", r"up to the first of the stop tokens \[5\], but gave 3"),
    (("(number, 7,", "(number + 1, 7,"), "generate", "IndexError"),
    (("time.perf_counter()", "-1.0"), "generate", "a time for each of 3 tokens, none before the last"),
    (("time.perf_counter()", "float('inf')"), "generate", "a time for each of 3 tokens, none before the last"),
])  # fmt: skip
def test_an_answer_of_another_shape_or_of_other_tokens_is_an_error_in_words(tmp_path, change, ask, words):
    assert 1 == RIGHT.count(change[0])
    with misbehaving(tmp_path, RIGHT.replace(*change)) as engine, pytest.raises(EngineError, match=words):
        if ask == "logprobs":
            engine.logprobs([[1, 2, 3]], top=1)
        else:
            engine.generate([[1]], 3, stop_ids=[5])


def test_an_answer_that_is_wrong_ends_the_engine(tmp_path):
    with misbehaving(tmp_path, RIGHT.replace("yield prompt,", "yield prompt[1:],")) as engine:
        with pytest.raises(EngineError, match="other ones"):
            engine.logprobs([[1, 2, 3]])
        wait_until_gone(engine.pid)


def test_an_engine_ends_if_the_process_that_started_it_is_killed(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from engines import misbehaving
with misbehaving(Path(sys.argv[1]), sys.argv[2]) as engine:
    print(engine.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = python(code, tmp_path, RIGHT)
    engine = int(done.stdout)
    try:
        assert -signal.SIGKILL == done.returncode
        wait_until_gone(engine)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(engine, signal.SIGKILL)


def test_facts_that_are_none_are_an_error(tmp_path):
    script = tmp_path / "engine.py"
    script.write_text('input(); print(\'{"engine": "none"}\'); input()')

    with pytest.raises(EngineError, match=r"must answer facts of itself, but: .*missing"):
        Engine.start("transformers", tmp_path, python=sys.executable, log=tmp_path / "log", script=script)


def test_files_that_engines_run_import_neither_package():
    for path in Path(processes.__path__[0]).glob("*.py"):
        text = path.read_text()
        assert "import bench" not in text and "from bench" not in text
        assert "import compression" not in text and "from compression" not in text
