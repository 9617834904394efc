"""The process that runs programs in the sandbox and reports how they ended; standard library only.

It is started as `python -I -S warden.py`, reads requests from its standard input, one in JSON a line, and prints a
report for each. For each it forks a warden, which stays outside; the warden's child locks itself in (`jail`) and
executes the program. No two programs share either.

The program passes by coming to its end. Leaving early, with whatever code, is failing. It runs in the interpreter that
reports its end: one that is written to forge that report can.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
import types

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from jail import PDEATHSIG, SUBREAPER, Unavailable, attempt, call, imprison, namespaces, step_down

sys.path.pop()  # a program does not see it


def execute(program):
    """Run the program to its end, in a module `__main__` of its own; returns "" or why it failed.

    Classes look for their module there by its name: dataclasses, pickle, typing.get_type_hints.
    """
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    module.__builtins__ = __builtins__
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), vars(module))
    except SystemExit as error:
        return f"it left before its end, with {error.code!r}"[:200]
    except BaseException as error:
        kind, said = type(error).__name__, ""
        del error
        try:
            said = str(sys.exc_info()[1])
        except BaseException:
            said = "no words"
        return f"{kind}: {said}"[:200]
    return ""


def watch(pipe, request):
    """What the prisoner says until it ends or its time is over: its layers, its last words, whether time ran out."""
    said, started, allowed = b"", time.monotonic(), request["seconds"] + 10  # for the layers
    while True:
        lines = said.count(b"\n")
        if lines == 1 and allowed > request["seconds"]:
            started, allowed = time.monotonic(), request["seconds"]
        left = started + allowed - time.monotonic()
        if left <= 0 or lines >= 2 or len(said) > 65536:
            break
        if select.select([pipe], [], [], left)[0]:
            piece = os.read(pipe, 4096)
            if not piece:
                break
            said += piece
    layers, _, words = said.partition(b"\n")
    return layers, words.partition(b"\n")[0].decode(errors="replace"), left <= 0


def end(prisoner):
    """Kill it and all that it left, and return its status.

    The kernel kills the rest of a process namespace. Elsewhere orphans come to this process, so that all are below it;
    they are stopped until no sweep finds another, since one that forks outruns any killing one by one.
    """
    stopped = set()
    while found := below(os.getpid()) - stopped:
        stopped |= found
        for each in found:
            send(each, signal.SIGSTOP)
    send(prisoner, signal.SIGKILL)
    _, status = os.waitpid(prisoner, 0)
    until = time.monotonic() + 5
    while (left := below(os.getpid())) and time.monotonic() < until:
        for each in left:
            send(each, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
    return status


def send(process, number):
    """A signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def below(ancestor):
    """All processes under one; none where there is no /proc."""
    children = {}
    for each in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            with open(f"/proc/{each}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(each))
    found, new = set(), children.get(ancestor, [])
    while new:
        found.update(new)
        new = [child for each in new for child in children.get(each, [])]
    return found


def guard(request):
    """A warden's whole life."""
    os.chdir(request["folder"])
    request["number"], request["root"] = os.getpid(), os.getuid() == 0
    layers = {}
    if sys.platform == "linux":
        call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        call("prctl", SUBREAPER, 1, 0, 0, 0)
        attempt(layers, "namespaces", lambda: namespaces(user=not request["root"]), request)
        if layers["namespaces"] is not True and request["root"]:  # as in a container
            step_down(layers, request, request["folder"])
            attempt(layers, "namespaces", lambda: namespaces(user=True), request)
            call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        layers["namespaces"] = f"no namespaces on {sys.platform}"
    hear, report = os.pipe()
    prisoner = os.fork()
    if not prisoner:
        try:
            imprison(request, layers, report)
            why = execute(request["program"])
            os.write(3, json.dumps({"end": why}).encode() + b"\n")
        finally:
            os._exit(1)
    os.close(report)
    started = time.monotonic()
    said, words, late = watch(hear, request)
    seconds = time.monotonic() - started
    status = end(prisoner)
    if not said.endswith(b"}"):
        raise Unavailable("no layers were reported; the last words of the prisoner are above")
    try:
        why = json.loads(words)["end"]
    except (ValueError, TypeError, KeyError):
        code = os.waitstatus_to_exitcode(status)
        why = f"killed by signal {-code}" if code < 0 else f"it left before its end, with {code}"
        why = f"not done after {request['seconds']:g} s" if late else why
    return {"why": why, "seconds": seconds, "layers": json.loads(said)}


def main():
    """Serves until its standard input ends."""
    if sys.platform == "linux":
        call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        warden = os.fork()
        if not warden:
            try:
                answer = guard(request)
            except Exception as error:
                answer = {"broken": f"{type(error).__name__}: {error}"}
            os.write(1, json.dumps(answer).encode() + b"\n")
            os._exit(0)
        os.waitpid(warden, 0)


if __name__ == "__main__":
    main()
