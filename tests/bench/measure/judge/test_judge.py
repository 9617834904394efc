"""Judges: what is read of a reply, an endpoint that misbehaves, replies on disk, biases, a local judge."""

import json
import math
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from fractions import Fraction

import pytest
from checkpoints import says
from hypothesis import given
from hypothesis import strategies as st
from judges import KEY, MISHAPS, QUICK, Server, by_answer, completion
from processes import running

from bench.errors import JudgeError, MetricError, NotAvailable, OptionError
from bench.measure.judge import alignment, bias, g_eval, readings
from bench.measure.judge.answers import Answered, Asked
from bench.measure.judge.asking import Verdict, chosen, restricted
from bench.measure.judge.endpoint import Endpoint, Patience, Refused, Url
from bench.measure.judge.key import Key
from bench.measure.judge.local import LocalJudge
from bench.measure.judge.remote import RemoteJudge
from bench.measure.judge.reply_cache import Cache, key_of
from bench.measure.judge.scores import Scores
from bench.measure.judge.setup import Setup

SCORES = g_eval.SCORES


def answered(text, truth="red", question="Which colour has the fox?"):
    asked = Asked(question=question, context="The fox is red.", truths=(truth,), prompt=f"Q: {question}",
                  instructions=("Be short.", "Be polite."))  # fmt: skip
    return Answered(asked, text)


def remote(server, folder, *, key=KEY, patience=QUICK, **settings):
    endpoint = Endpoint(Url(server.url), key=Key(key), patience=patience)
    return RemoteJudge(endpoint, "judge-1", Cache(folder / "judge.jsonl"), **settings)


# --- what is read of a reply ------------------------------------------------------------------------------------------


def test_the_score_is_the_mean_under_the_probabilities_of_the_five_scores_alone():
    tops = {"4": 0.5, "The": 0.2, " 4": 0.1, "5": 0.1, "3": 0.05, "7": 0.05}
    weights = restricted({token: math.log(share) for token, share in tops.items()}, SCORES)
    # by hand: 3, 4 and 5 have 0.05, 0.6 and 0.1 of 0.75: (0.15 + 2.4 + 0.5) / 0.75 = 61 / 15
    by_hand = (3 * Fraction(5, 100) + 4 * Fraction(60, 100) + 5 * Fraction(10, 100)) / Fraction(75, 100)

    assert Fraction(61, 15) == by_hand
    assert float(by_hand) == pytest.approx(g_eval.score(Verdict(weights)), abs=1e-12)


def test_the_score_of_a_judge_over_http_is_the_one_worked_by_hand(tmp_path):
    shares = {"4": 0.6, "5": 0.1, "3": 0.05, "The": 0.25}
    with Server(lambda body: completion("4", [shares])) as server:
        [verdict] = remote(server, tmp_path).choose(["Score:"], SCORES)

    assert 61 / 15 == pytest.approx(g_eval.score(verdict), abs=1e-12)


@given(st.dictionaries(st.sampled_from([*"12345", " 3", "3 ", "The", "33", ""]), st.floats(-30, 0), max_size=8))
def test_weights_are_those_of_the_options_and_sum_to_one(tops):
    weights = restricted(tops, SCORES)

    assert set(weights) == {token.strip() for token in tops} & set(SCORES)
    if weights:
        assert math.fsum(weights.values()) == pytest.approx(1)
        assert 1 - 1e-9 <= g_eval.score(Verdict(weights)) <= 5 + 1e-9


@pytest.mark.parametrize(
    "text", ["", "I think it is good", "6", "0", "-4", "4.5", "4 or 5", "44", "between 3 and 4", "Score: high"]
)
def test_a_reply_that_is_no_score_is_none(text):
    assert chosen(text, SCORES) is None


@pytest.mark.parametrize("text", ["4", " 4\n", "**4**", "Score: 4", "4/5", "**Score:** 4.", "`4`", "Correctness = 4"])
def test_a_score_with_marks_around_it_is_read(text):
    assert "4" == chosen(text, SCORES)


def test_without_log_probabilities_the_score_is_the_mean_of_the_samples_that_can_be_read(tmp_path):
    said = ["4", "5", "I would say four", "4"]
    with Server(lambda body: completion(said[body.get("seed", 0)])) as server:
        judge = remote(server, tmp_path, samples=4)
        [verdict] = judge.choose(["Score:"], SCORES)

    assert 13 / 3 == pytest.approx(g_eval.score(verdict))
    assert ("none of 1, 2, 3, 4, 5: 'I would say four'",) == verdict.invalid
    assert "samples4" == judge.how


def test_an_endpoint_that_refuses_log_probabilities_is_asked_for_samples(tmp_path):
    def judge(body):
        return {"error": "refused: logprobs is not supported"} if "logprobs" in body else completion("2")

    with Server(judge) as server:
        [verdict] = remote(server, tmp_path, samples=2).choose(["Score:"], SCORES)

    assert 2 == g_eval.score(verdict)
    assert 2 == server.answered.total()


# --- an endpoint that misbehaves --------------------------------------------------------------------------------------


def answered_in_s(folder):
    """Seconds that one question to a sound server takes here, now."""
    start = time.monotonic()
    with Server() as server:
        remote(server, folder).choose(["Score:"], SCORES)
    return time.monotonic() - start


@pytest.mark.parametrize("mishap", [*MISHAPS, "hang", "drip"])
def test_what_passes_is_asked_again_and_answered_once(tmp_path, mishap):
    timeout = max(0.5, 50 * answered_in_s(tmp_path / "before")) if mishap in ("hang", "drip") else 3600
    patience = Patience(timeout=timeout, attempts=3, first=0.001)
    with Server(mishaps=lambda number: mishap if number < 2 else None) as server:
        [verdict] = remote(server, tmp_path, patience=patience).choose(["Score:"], SCORES)

    assert 4.25 == pytest.approx(g_eval.score(verdict))
    assert 3 == len(server.times)
    assert [1] == list(server.answered.values())


def test_a_server_that_misbehaves_at_two_requests_of_three_costs_no_result_and_no_duplicate(tmp_path):
    prompts = [f"Is {n} even?\nScore:" for n in range(30)]
    with Server(mishaps=lambda number: MISHAPS[number % len(MISHAPS)] if number % 3 else None) as server:
        judge = remote(server, tmp_path, patience=Patience(timeout=3600, attempts=60, first=0.0001, longest=0.01))
        verdicts = judge.choose(prompts * 2, SCORES)
    kept = [json.loads(line)["key"] for line in (tmp_path / "judge.jsonl").read_text().splitlines()]

    assert 60 == len(verdicts)
    assert all(verdict.valid and not verdict.invalid for verdict in verdicts)
    assert 30 == len(kept) == len(set(kept)) == len(server.answered)
    assert {1} == set(server.answered.values())
    assert len(server.times) > 60


def test_a_server_that_never_answers_is_an_error_that_says_what_it_did(tmp_path):
    with Server(mishaps=lambda number: "500") as server:
        judge = remote(server, tmp_path)
        with pytest.raises(JudgeError, match=says(server.url, "8 attempts", "status 500", "--resume")):
            judge.choose(["Score:"], SCORES)
    assert 8 == len(server.times)


def test_no_server_is_an_error_too(tmp_path):
    with Server() as server:
        pass
    with pytest.raises(JudgeError, match=says("ConnectionRefusedError")):
        remote(server, tmp_path).choose(["Score:"], SCORES)


def test_the_server_says_how_long_to_wait_and_every_request_waits(tmp_path):
    with Server(mishaps=lambda number: "429" if number == 0 else None, retry_after="1") as server:
        remote(server, tmp_path, concurrency=1).choose(["one Score:", "two Score:"], SCORES)

    assert server.times[1] - server.times[0] >= 0.99


def test_a_wait_that_is_too_long_is_an_error_at_once(tmp_path):
    with Server(mishaps=lambda number: "429", retry_after="3600") as server:
        judge = remote(server, tmp_path)
        with pytest.raises(JudgeError, match=says("asks to wait 3600 s", "2 s that are waited")):
            judge.choose(["Score:"], SCORES)
    assert 1 == len(server.times)


def test_a_refusal_is_an_error_at_once_and_shows_no_key(tmp_path):
    with Server(mishaps=lambda number: "401") as server:
        judge = remote(server, tmp_path)
        with pytest.raises(Refused, match=says("status 401", "BENCH_JUDGE_KEY", "[key]")) as raised:
            judge.choose(["Score:"], SCORES)
    assert {f"Bearer {KEY}"} == server.keys  # it was sent
    assert KEY not in str(raised.value) + repr(judge.endpoint)
    assert 1 == len(server.times)


def test_a_redirection_is_not_followed(tmp_path):
    with Server(mishaps=lambda number: "redirect") as server:
        judge = remote(server, tmp_path)
        with pytest.raises(Refused, match="status 307"):
            judge.choose(["Score:"], SCORES)
    assert ["/v1/chat/completions"] == server.paths


def test_no_more_requests_are_under_way_than_allowed(tmp_path):
    prompts = [f"{n} Score:" for n in range(12)]
    with Server(gate=threading.Barrier(3)) as server:  # which lets requests through by threes
        judge = remote(server, tmp_path, concurrency=3)
        judge._logprobs = True
        judge.choose(prompts, SCORES)

    assert 3 == server.most
    assert 12 == len(server.times)


@pytest.mark.parametrize("key", ["two words", "line\nend", 'quo"te', ""])
def test_a_key_that_cannot_be_is_refused_without_showing_it(key):
    with pytest.raises(OptionError, match="BENCH_JUDGE_KEY") as raised:
        Key(key)
    assert not key or key not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"url": Url("http://host/v1")}, ["--judge-url needs --judge-model"]),
        ({"model": "m"}, ["--judge-model needs --judge-url"]),
        ({"url": Url("http://host/v1"), "model": "m", "local": "reference"}, ["either --judge-url or --judge"]),
        ({"samples": 0}, ["--judge-samples must be at least 1, not 0"]),
        ({"decoding": "beam"}, ["--judge-decoding must be one of sampled, greedy, not beam"]),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else "",
)
def test_a_setup_that_cannot_be_is_refused(given, words):
    with pytest.raises(OptionError, match=says(*words)):
        Setup(**given)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("host/v1", "not the address of an endpoint"),
        ("ftp://host/v1", "not the address of an endpoint"),
        ("http://me:secret@host/v1", "BENCH_JUDGE_KEY"),
        ("http://secret@host/v1", "BENCH_JUDGE_KEY"),
        ("http://host/v1?key=secret", "BENCH_JUDGE_KEY"),
        ("http://host/v1#secret", "BENCH_JUDGE_KEY"),
        ("http://[secret/v1", "not a valid URL"),
        ("http://host:secret/v1", "not a valid URL"),
        ("http://host:99999/v1", "not a valid URL"),
        ("http://host/secret\r\nv1 x", "invalid port or characters"),
        ("http://h\u00f6st/v1", "invalid port or characters"),
    ],
)
def test_a_url_that_cannot_be_is_refused_and_stands_in_no_frame(url, words):
    with pytest.raises(OptionError, match=words) as raised:
        Url(url)
    frame = raised.value.__traceback__.tb_next.tb_frame

    assert "secret" not in str(raised.value) + repr(frame.f_locals)


# --- replies on disk --------------------------------------------------------------------------------------------------


def test_two_writers_lose_nothing_and_keep_one_reply_to_each_question(tmp_path):
    code = (
        "import sys; from bench.measure.judge.reply_cache import Cache;"
        "cache = Cache(sys.argv[1]); print('ready', flush=True);"
        "sys.stdin.readline();"
        "[print(cache.put(str(n), {'by': sys.argv[2], 'text': 'x' * 5000})['by']) for n in range(100)]"
    )
    path = tmp_path / "judge.jsonl"
    pipes = {"text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with ExitStack() as held:
        writers = [held.enter_context(running([sys.executable, "-c", code, path, name], **pipes)) for name in "ab"]
        assert ["ready\n"] * 2 == [writer.stdout.readline() for writer in writers]
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        told = [writer.communicate()[0].split() for writer in writers]
    kept = [json.loads(line) for line in path.read_text().splitlines()]

    assert [str(n) for n in range(100)] == sorted((line["key"] for line in kept), key=int)
    assert told[0] == told[1] == [line["reply"]["by"] for line in sorted(kept, key=lambda line: int(line["key"]))]


def test_a_line_that_a_killed_writer_left_unfinished_is_taken_away(tmp_path):
    path = tmp_path / "judge.jsonl"
    Cache(path).put("one", {"text": "1"})
    with path.open("a") as file:
        file.write('{"key": "two", "rep')
    cache = Cache(path)

    assert cache.get("two") is None
    cache.put("three", {"text": "3"})
    assert ["one", "three"] == [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_a_damaged_line_is_refused_with_its_place(tmp_path):
    path = tmp_path / "judge.jsonl"
    path.write_text('{"key": "one", "reply": {}}\n{"key": \n')
    with pytest.raises(JudgeError, match=says("judge.jsonl", "byte 28", "delete")):
        Cache(path)


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), min_size=1, max_size=4), st.data())
def test_whatever_is_sent_belongs_to_the_key(sent, data):
    name = data.draw(st.sampled_from(sorted(sent)))

    assert key_of(sent) == key_of(dict(reversed(sent.items())))
    assert key_of(sent) != key_of(sent | {name: "something else"})


def test_another_model_or_url_is_asked_anew(tmp_path):
    with Server() as server:
        cache = Cache(tmp_path / "judge.jsonl")
        for model in ("judge-1", "judge-2", "judge-1"):
            RemoteJudge(Endpoint(Url(server.url), patience=QUICK), model, cache).choose(["Score:"], SCORES)

    assert 2 == server.answered.total() == len(cache)


# --- what is made of verdicts -----------------------------------------------------------------------------------------


def test_a_judgement_that_cannot_be_read_is_counted_and_is_no_zero(tmp_path):
    answers = [answered("red"), answered("blue", question="And the sky?"), answered("hm", question="And the sea?")]
    with Server(by_answer({"red": "5", "blue": "1", "hm": "I cannot tell"})) as server:
        judge = remote(server, tmp_path)
        scores = readings.judged(judge, g_eval.write_steps(judge), answers)

    assert (1.0, 0.0, None) == scores.by["g_eval_correctness"]
    assert 0.5 == scores.mean("g_eval")
    assert 2 == len(scores.invalid)
    assert "2 replies of the judge were no verdict" in scores.remark
    assert 2 == len(scores.items["judge.g_eval"])


def test_where_no_judgement_can_be_read_there_is_no_value():
    scores = Scores(hashes=("0" * 16,), by={"g_eval": (None,)}, invalid=("it said hm",))
    with pytest.raises(MetricError, match=says("none of 1 answers", "it said hm")):
        scores.mean("g_eval")


def test_a_model_and_its_base_are_compared_on_the_questions_that_both_have_verdicts_on():
    hashes = tuple(f"{n:016x}" for n in range(3))
    other = Scores(hashes=hashes, by={"g_eval": (0.0, 1.0, None)})
    mine, base = Scores(hashes=hashes, by={"g_eval": (0.5, None, 1.0)}).beside(other)

    assert (0.5, 0.0) == (mine.mean("g_eval"), base.mean("g_eval"))
    assert mine.items["judge.g_eval"].hashes == base.items["judge.g_eval"].hashes == hashes[:1]


def test_instructions_are_judged_one_by_one(tmp_path):
    def judge(body):
        follows = "Be short." in body["messages"][0]["content"]
        return completion("yes" if follows else "no", [{"yes": 0.9, "no": 0.1} if follows else {"no": 0.6, "yes": 0.4}])

    with Server(judge) as server:
        [verdicts] = alignment.judged(remote(server, tmp_path), [answered("red")])

    assert 0.5 == alignment.share(verdicts)
    assert 2 == server.answered.total()


def test_the_judge_is_shown_the_right_answer_for_correctness_and_not_for_relevance():
    correctness, relevance = (g_eval.score_prompt(each, "1. Read.", answered("blue")) for each in g_eval.CRITERIA)

    assert "<right-answer>\nred\n" in correctness
    assert "right-answer" not in relevance
    assert all("<answer>\nblue\n" in prompt and "1. Read." in prompt for prompt in (correctness, relevance))


def comparing(prefers):
    """A judge whose preference among two answers is `prefers(first, second)`, the probability of the first."""

    def judge(body):
        prompt = body["messages"][0]["content"]
        if not prompt.endswith("Better:"):
            said = prompt.partition("<answer>\n")[2].partition("\n</answer>")[0]
            score = "5" if len(said) > 20 else "3"
            return completion(score, [{score: 0.9, "x": 0.1}])
        first, second = (prompt.partition(f"<answer-{n}>\n")[2].partition("\n</answer")[0] for n in "AB")
        share = prefers(first, second)
        return completion("A" if share > 0.5 else "B", [{"A": share, "B": 1 - share}])

    return judge


@pytest.mark.parametrize(
    ("prefers", "flips", "first_place"),
    [(lambda first, second: 0.9, 1.0, 0.9), (lambda first, second: 0.9 if first == "red" else 0.1, 0.0, 0.5)],
    ids=["the-first", "the-right-one"],
)
def test_a_judge_that_prefers_a_place_is_told_from_one_that_prefers_an_answer(tmp_path, prefers, flips, first_place):
    answers = [answered("blue"), answered("green", question="And now?"), answered("red", "red", "And then?")]
    answers += [answered("red", "grey", "And the owl?")]
    with Server(comparing(prefers)) as server:
        found = bias.measured(remote(server, tmp_path), dict.fromkeys(("correctness", "relevance"), "1."), answers)

    assert flips == found.flips
    assert first_place == pytest.approx(found.first_place)
    assert 0.5 == found.gain  # from 3 to 5 by padding


def test_where_no_two_answers_differ_there_is_no_bias_to_measure(tmp_path):
    with Server() as server, pytest.raises(NotAvailable, match="no verdicts to compare"):
        bias.measured(remote(server, tmp_path), dict.fromkeys(("correctness", "relevance"), "1."), [answered("red")])


# --- a local judge ----------------------------------------------------------------------------------------------------


def test_a_local_judge_gives_the_probabilities_of_its_own_next_token(small_judge):
    import torch

    judge = LocalJudge(str(small_judge))
    model, tokenizer = judge.opened
    ids = torch.tensor([tokenizer("Score: ")["input_ids"]])
    with torch.inference_mode():
        after_the_space = model(ids).logits[0, -1].double().softmax(-1)
    shares = [float(after_the_space[tokenizer(option)["input_ids"][-1]]) for option in SCORES]
    [verdict] = judge.choose(["Score:"], SCORES)

    for option, share in zip(SCORES, shares, strict=True):
        assert share / sum(shares) == pytest.approx(verdict.weights[option], rel=1e-3)


def test_a_prompt_that_a_local_judge_cannot_hold_has_no_verdict(small_judge):
    fits, too_long = LocalJudge(str(small_judge)).choose(["Score:", "long " * 1000 + "Score:"], SCORES)

    assert fits.valid
    assert not too_long.valid
    assert "does not fit into the 2040 positions of local:small" in too_long.invalid[0]
