"""What a hostile judge can do: make a traceback show the key, end a run, keep it busy for ever."""

import base64
import copy
import json
import os
import pickle
import re
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from judges import Server, completion
from misbehaving import ANSWERS, misbehaving
from processes import completed

from bench.errors import JudgeError
from bench.machine.environment import child_environment
from bench.measure.judge.asking import chosen
from bench.measure.judge.clarity import sentences
from bench.measure.judge.endpoint import Endpoint, Patience, Url
from bench.measure.judge.key import HIDDEN, Key
from bench.measure.judge.remote import RemoteJudge
from bench.measure.judge.reply_cache import Cache

SECRET = "sk-Xq7Lw9Zp3Rt5Vn8Bk2Hd6Jf4"
FORMS = {SECRET, *(base64.b64encode(b" " * n + SECRET.encode()).decode()[4:-4] for n in range(3))}
PIECES = {form[at : at + 8] for form in FORMS for at in range(len(form) - 7)}

short_texts = st.text(max_size=20)

FAILING = """
import http.client, os, socket
import pytest
from bench.measure.judge import exchange
from bench.measure.judge.reply_cache import Cache
from bench.measure.judge.endpoint import Endpoint, Patience, Url
from bench.measure.judge.key import Key
from bench.measure.judge.remote import RemoteJudge

exchange.LARGEST = 2**20

def judge(url, folder):
    endpoint = Endpoint(url, key=Key.from_environment(), patience=Patience(timeout=3600, attempts=1))
    return RemoteJudge(endpoint, "m", Cache(folder / "judge.jsonl"))

@pytest.mark.parametrize("name", os.environ["NAMES"].split())
def test_reply(name, tmp_path):
    asked = judge(Url(f"http://127.0.0.1:{os.environ['PORT']}/{name}"), tmp_path)
    said = asked.choose(["Score:"], "12345")
    assert not said

@pytest.mark.parametrize("name", os.environ["NAMES"].split())
def test_write(name, tmp_path):
    assert not judge(Url(f"http://127.0.0.1:{os.environ['PORT']}/{name}"), tmp_path).write("Steps:")

def test_no_handshake(tmp_path):
    judge(Url(f"https://127.0.0.1:{os.environ['PORT']}/text"), tmp_path).choose(["Score:"], "12345")

@pytest.mark.parametrize("place", range(6))
def test_url(place, tmp_path):
    judge(Url(os.environ["URLS"].split()[place]), tmp_path).choose(["Score:"], "12345")

@pytest.mark.parametrize("wrong", [" ", chr(10), "'"])
def test_key(wrong):
    Key(os.environ["BENCH_JUDGE_KEY"] + wrong)

def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        judge(Url(f"http://127.0.0.1:{free.getsockname()[1]}/v1"), tmp_path).choose(["Score:"], "12345")

def test_interrupted(tmp_path, monkeypatch):
    class Stop(BaseException):
        pass
    def read(self, *_):
        raise Stop("between two bytes")
    monkeypatch.setattr(http.client.HTTPResponse, "read", read)
    judge(Url(f"http://127.0.0.1:{os.environ['PORT']}/text"), tmp_path).choose(["Score:"], "12345")

def test_control():
    if os.environ["CONTROL"]:
        header = "Bearer " + os.environ["BENCH_JUDGE_KEY"]
        raise ValueError("negative count")
"""
URLS = (f"http://me:{SECRET}@h/v1", f"http://h/v1?key={SECRET}", f"http://[{SECRET}/v1", f"http://h:{SECRET}/v1",
        f"http://{SECRET}@h/v1", f"{SECRET}://h/v1")  # fmt: skip


def failures(folder, server, *options, control=""):
    """What pytest prints of tests that all fail, with the local variables of every frame."""
    (folder / "test_failing.py").write_text(FAILING)
    environment = os.environ | {
        "BENCH_JUDGE_KEY": SECRET, "PORT": str(server.server_address[1]), "NAMES": " ".join(ANSWERS),
        "URLS": " ".join(URLS), "CONTROL": control,
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-l", "-vv", "-p", "no:cacheprovider", "--tb=long", *options]
    done = completed(command, cwd=folder, env=environment)
    return done.stdout + done.stderr


@pytest.mark.process
def test_no_traceback_with_local_variables_shows_the_key_whatever_the_server_does(tmp_path):
    with misbehaving() as server:
        shown = failures(tmp_path, server)
        said = set(server.said)
    kept = "".join(path.read_text() for path in tmp_path.rglob("judge.jsonl"))

    assert f"{2 * len(ANSWERS) + 12} failed, 1 passed" in shown  # all but the control
    assert {f"Bearer {SECRET}"} == said  # it was sent
    assert [] == [piece for piece in PIECES if piece in shown + kept]
    assert HIDDEN in shown


def test_a_traceback_that_shows_the_key_would_be_found(tmp_path):
    with misbehaving() as server:
        shown = failures(tmp_path, server, "-k", "control", control="yes")

    assert [] != [piece for piece in PIECES if piece in shown]


def test_a_key_shows_nothing_of_itself():
    key = Key(SECRET)

    assert {HIDDEN} == {str(key), repr(key), f"{key}", f"{key!s:>3}"}
    for leak in (pickle.dumps, copy.copy, copy.deepcopy, json.dumps):
        with pytest.raises(TypeError):
            leak(key)


@given(short_texts, st.sampled_from(sorted(FORMS)), st.integers(0, 20), st.integers(8, 40), short_texts)
def test_the_key_its_pieces_and_their_base64_are_taken_out_and_nothing_else(before, form, begin, length, behind):
    piece = form[begin : begin + length]
    hidden = Key(SECRET).hidden(before + piece + behind)

    if len(piece) >= 8:
        assert [] == [each for each in PIECES if each in hidden]
        assert HIDDEN in hidden
    assert before + behind == Key(SECRET).hidden(before + behind)


def test_a_child_process_does_not_inherit_the_key(monkeypatch):
    monkeypatch.setenv("BENCH_JUDGE_KEY", SECRET)
    code = "import os; print('BENCH_JUDGE_KEY' in os.environ, os.environ['MORE'])"
    said = completed([sys.executable, "-c", code], env=child_environment(MORE="1"))

    assert "False 1" == said.stdout.strip()


# --- what is no verdict -----------------------------------------------------------------------------------------------


def scored(logprob, text="4", **more):
    """A reply of one token with the JSON text `logprob` as its log-probability."""
    content = [{"token": "4", "logprob": -0.5, "top_logprobs": [{"token": "5", "logprob": -1.0}, *more.values()]}]
    reply = completion(text)
    reply["choices"][0]["logprobs"] = {"content": content}
    return json.dumps(reply).replace("-0.5", logprob)


NO_VERDICT = {
    **{f"logprob-{text[:9]}": scored(text) for text in
       ("NaN", "Infinity", "-Infinity", "1e999", "800", "0.01", "9" * 400, "true", '"-0.5"', "null")},
    "together-more-than-1": scored("0", more={"token": "3", "logprob": -0.01}),
    "deep": '{"choices": [' * 100_000,
    "deep-list": '{"choices": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": scored("9" * 5000),
    "no-choices": '{"choices": null}',
    "no-text": '{"choices": [{"message": {"content": [1, 2]}}]}',
    "half-of-a-pair": scored("-0.5", text="\ud83d"),
    "blanks": scored("-0.5", text=" " * 200_000 + "x"),
    "blanks-and-a-label": scored("-0.5", text="Score" + " " * 200_000 + "high"),
    "marks": scored("-0.5", text="*(" * 100_000 + "4:"),
}  # fmt: skip


@pytest.mark.parametrize("reply", NO_VERDICT.values(), ids=NO_VERDICT)
def test_what_is_no_verdict_is_counted_and_ends_neither_this_run_nor_the_next(tmp_path, reply):
    patience = Patience(timeout=3600, attempts=2, first=0.001)
    with Server(lambda body: None) as server:
        server.text = reply
        judge = RemoteJudge(Endpoint(Url(server.url), patience=patience), "m", Cache(tmp_path / "judge.jsonl"))
        judge._logprobs = True
        first, again = judge.choose(["one Score:", "two Score:"], "12345"), judge.choose(["one Score:"], "12345")
        resumed = RemoteJudge(Endpoint(Url(server.url), patience=patience), "m", Cache(tmp_path / "judge.jsonl"))
        resumed._logprobs = True
        [later] = resumed.choose(["one Score:"], "12345")

    for verdict in (*first, *again, later):
        assert not verdict.valid
        assert 1 == len(verdict.invalid)
    assert again[0] == first[0] == later


def test_log_probabilities_as_they_are_given_are_a_verdict(tmp_path):
    """The same replies, sound: that above is not for another reason."""
    with Server(lambda body: None) as server:
        server.text = scored("-0.5")
        judge = RemoteJudge(Endpoint(Url(server.url)), "m", Cache(tmp_path / "judge.jsonl"))
        [verdict] = judge.choose(["Score:"], "12345")

    assert verdict.valid and not verdict.invalid


@pytest.mark.parametrize(
    "reply", ["{}", '{"text": 4, "end": "stop", "tops": []}', '{"text": "4", "end": "", "tops": [{"4": true}]}']
)
def test_a_kept_reply_of_another_form_is_refused_with_its_place(tmp_path, reply):
    with Server() as server:
        judge = RemoteJudge(Endpoint(Url(server.url)), "m", Cache(tmp_path / "judge.jsonl"))
        judge.choose(["Score:"], "12345")
        path = tmp_path / "judge.jsonl"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"reply": json.loads(reply)}) + "\n")
        judge = RemoteJudge(Endpoint(Url(server.url)), "m", Cache(path))
        with pytest.raises(JudgeError, match=f"judge.jsonl.*{record['key']}"):
            judge.choose(["Score:"], "12345")


@pytest.mark.parametrize("reply", ["[" * 100_000, '"4"}', "[]}"], ids=["deep", "text", "list"])
def test_a_kept_line_that_is_nested_too_deeply_or_holds_no_reply_is_damaged(tmp_path, reply):
    (tmp_path / "judge.jsonl").write_text('{"key": "a", "reply": ' + reply + "\n")
    with pytest.raises(JudgeError, match="byte 0 is damaged"):
        Cache(tmp_path / "judge.jsonl")


SLOW = r"""[\s*"'`(\[]*(?:[a-z ]+\W*[:=][\s*]*)?[\s*"'`(\[]*([12345]|yes)[\s*"'`)\]]*(?:/\s*\d+)?[\s*.!"'`)\]]*"""


SIGNS = ["4", "yes", "5", "a", "Score", " ", "\n", "*", ":", "=", "/", ".", "(", ")", "-", '"']


@given(st.lists(st.sampled_from(SIGNS), max_size=8).map("".join))
@example("**Score:** 4/5.")
def test_a_choice_is_that_of_the_pattern_that_describes_it(text):
    found = re.fullmatch(SLOW, text, re.IGNORECASE)
    label = re.split("[:=]", text)[:-1]

    if not label or re.search("[a-z]", "".join(label), re.IGNORECASE):
        assert (found[1].lower() if found else None) == chosen(text, ("1", "2", "3", "4", "5", "yes"))


def test_marks_without_end_are_one_sentence():
    assert 1 == sentences("a " + "!" * 200_000 + "b")
