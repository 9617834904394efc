"""The conversation of an engine's process: a line of JSON in, a line of JSON out. Standard library only.

The first line opens a model; its fields are those of `open_model`. Every further line has an operation in `op`:

    logprobs   {"prompts": [[id, ...], ...], "top": k}
               {"scores": [{"tokens": ids, "logprobs": [...], "top": [[[id, logprob], ...], ...]}, ...]}
    generate   {"prompts": ..., "new_tokens": n, "stop_ids": [...], "ignore_eos": false, "sampling": null}
               or, as "sampling", {"temperature": t, "top_p": p, "seeds": [one for each prompt]}
               {"sequences": [{"prompt": ids, "ids": [...], "arrivals_s": [...]}, ...]}
    arrive     {"prompts": ..., "arrivals_s": [one for each prompt, in order], "new_tokens": n}
               {"sequences": as above}
    memory     {}
               {"anonymous_bytes": n, "peak_bytes": n, "source": where they were read}

Log-probabilities are in nat, of every token after the first. Times are seconds since the request was read. A failure is
answered with {"error": words, "kind": name of its type}, and its traceback goes to standard error.
"""

import contextlib
import json
import os
import re
import sys
import time
import traceback


def serve(open_model):
    """Answer until the input ends.

    `open_model` takes the fields of the first line and returns a model and a dictionary of facts. A model has
    `logprobs(prompts, top)`, which yields (tokens, logprobs, top) per prompt, and
    `generate(prompts, new_tokens, stop_ids, sampling)`, which yields (number of the prompt, token, moment of
    `perf_counter` at which it arrived), those of a prompt in order. One that takes prompts while it computes others has
    `arrive(prompts, moments, new_tokens)` too, with the moment at which each is submitted.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    model = None
    for line in sys.stdin:
        begin = time.perf_counter()
        try:
            request = json.loads(line)
            if model is None:
                model, facts = open_model(**request)
                answer = facts | {"load_s": time.perf_counter() - begin}
            else:
                answer = OPERATIONS[request.pop("op")](model, begin, **request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": str(error) or "no message", "kind": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


def logprobs(model, begin, prompts, top):
    scores = [
        {"tokens": tokens, "logprobs": values, "top": best} for tokens, values, best in model.logprobs(prompts, top)
    ]
    return {"scores": scores}


def generate(model, begin, prompts, new_tokens, stop_ids, ignore_eos, sampling):
    return told(prompts, begin, model.generate(prompts, new_tokens, [] if ignore_eos else stop_ids, sampling))


def arrive(model, begin, prompts, arrivals_s, new_tokens):
    return told(prompts, begin, model.arrive(prompts, [begin + each for each in arrivals_s], new_tokens))


def told(prompts, begin, tokens):
    sequences = [{"prompt": prompt, "ids": [], "arrivals_s": []} for prompt in prompts]
    for number, token, moment in tokens:
        sequences[number]["arrivals_s"].append(moment - begin)
        sequences[number]["ids"].append(token)
    return {"sequences": sequences}


def memory(model, begin):
    """Anonymous resident bytes now, and at most since the last time this was asked for, or since the start."""
    found = [memory_of(process) for process in processes()]
    source = "RssAnon and VmHWM of the engine's process" + ("es" if len(found) > 1 else "")
    return {"anonymous_bytes": sum(now for now, _ in found), "peak_bytes": sum(peak for _, peak in found),
            "source": source}  # fmt: skip


def processes():
    """This process and those that it started, which are of its group."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # one that ended meanwhile
            if os.getpgid(int(name)) == os.getpgrp():
                yield int(name)


def memory_of(process):
    """Anonymous resident bytes of a process now, and at most since the last time."""
    with open(f"/proc/{process}/status") as file:
        text = file.read()
    read = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    now = read.get("RssAnon", 0)  # one that ended has none
    peak = max(now, read.get("VmHWM", 0) - read.get("RssFile", 0) - read.get("RssShmem", 0))
    with open(f"/proc/{process}/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    return now, peak


OPERATIONS = {"logprobs": logprobs, "generate": generate, "arrive": arrive, "memory": memory}
