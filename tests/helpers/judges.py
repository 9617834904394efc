"""A real HTTP server on loopback that judges as an OpenAI-compatible endpoint does, and misbehaves when told to."""

import json
import math
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bench.measure.judge.endpoint import Patience

KEY = "sk-loopback-7f3a9c"
MISHAPS = ("429", "500", "not json", "no completion", "half", "close")  # that pass
QUICK = Patience(timeout=3600, attempts=8, first=0.001, longest=2)  # nobody waits for so long but for a hung one


def completion(text, tops=()):
    """A whole reply; `tops` are, for each token, probabilities of tokens, the first being the one that was written."""
    content = [
        {"token": next(iter(at)), "logprob": math.log(next(iter(at.values()))),
         "top_logprobs": [{"token": token, "logprob": math.log(share)} for token, share in at.items()]}
        for at in tops
    ]  # fmt: skip
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice | ({"logprobs": {"content": content}} if tops else {})]}


def opinion(body):
    """What a judge that likes everything a little says: steps; yes; the first answer; 4, perhaps 5."""
    prompt = body["messages"][0]["content"]
    for ending, shares in (("Score:", {"4": 0.6, "5": 0.2, "The": 0.2}), ("Verdict:", {"yes": 0.9, "no": 0.1}),
                           ("Better:", {"A": 0.75, "B": 0.25})):  # fmt: skip
        if prompt.endswith(ending):
            return completion(next(iter(shares)), [shares] if body.get("logprobs") else ())
    return completion("1. Read the text.\n2. Compare.")


def by_answer(scores, otherwise="3"):
    """A judge that knows answers by heart."""

    def judge(body):
        prompt = body["messages"][0]["content"]
        if not prompt.endswith("Score:"):
            return opinion(body)
        said = prompt.partition("<answer>\n")[2].partition("\n</answer>")[0]
        return completion(scores.get(said, otherwise), [{scores.get(said, otherwise): 0.8, "x": 0.2}])

    return judge


class Server:
    """Answers by `judge(body)`, once the misbehaviour that `mishaps` yields for a request has been played.

    `mishaps(number)` gives, for the n-th request (from 0), None or one of: "429", "500", "401", "redirect", "not json",
    "no completion", "half", "close", "drip", and "hang", until the server stops. `retry_after` is sent as Retry-After.

    Attributes:
        answered: how often each body got a whole completion.
        times: when each request came, and `most` how many were under way at once.
        held: set when a request hangs.
    """

    def __init__(self, judge=opinion, mishaps=lambda number: None, *, retry_after=None, gate=None):
        self.text = None  # said instead, if it is set
        self.judge, self.mishaps, self.retry_after, self.gate = judge, mishaps, retry_after, gate
        self.answered, self.times, self.paths, self.keys = Counter(), [], [], set()
        self.most = self._under_way = 0
        self.held, self._over, self._lock = threading.Event(), threading.Event(), threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(outer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with outer._lock:
                    number = len(outer.times)
                    outer.times.append(time.monotonic())
                    outer.paths.append(self.path)
                    outer.keys.add(self.headers.get("Authorization"))
                    outer._under_way += 1
                    outer.most = max(outer.most, outer._under_way)
                try:
                    if outer.gate:
                        outer.gate.wait()
                    outer._play(self, outer.mishaps(number), body)
                except OSError:  # the client has gone
                    pass
                finally:
                    with outer._lock:
                        outer._under_way -= 1

            def log_message(self, *arguments):
                pass

        return Handler

    def _play(self, handler, mishap, body):
        said = json.dumps(self.judge(json.loads(body))) if self.text is None else self.text
        if mishap == "close":
            return
        if mishap == "hang":
            self.held.set()
            self._over.wait()
            return
        if mishap in ("429", "500", "401"):
            echo = {"error": {"message": f"not now; you sent {handler.headers.get('Authorization')}"}}
            return self._send(handler, int(mishap), json.dumps(echo))
        if mishap == "redirect":
            return self._send(handler, 307, "", {"Location": "/elsewhere"})
        if mishap in ("not json", "no completion"):
            return self._send(handler, 200, {"not json": said[:-5], "no completion": '{"choices": []}'}[mishap])
        if mishap == "half":
            return self._send(handler, 200, said[: len(said) // 2], {"Content-Length": len(said)})
        if mishap == "drip":
            return self._drip(handler, said)
        if "refused" in said:
            return self._send(handler, 400, said)
        with self._lock:
            self.answered[body] += 1
        self._send(handler, 200, said)

    def _send(self, handler, status, text, headers=()):
        handler.send_response(status)
        told = {"Retry-After": self.retry_after} if self.retry_after and status in (429, 500) else {}
        for name, value in ({"Content-Length": len(text)} | told | dict(headers)).items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(text.encode())

    def _drip(self, handler, text):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        for letter in text:
            handler.wfile.write(letter.encode())
            handler.wfile.flush()
            if self._over.wait(0.05):
                return
