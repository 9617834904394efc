"""Runs programs in a jail and says how they went: the other side of `bench.sandbox`, on the standard library alone.

It is started as `python -I -S _jail.py`, reads requests from its standard input, one in JSON a line, and prints a
report for each. For each it forks a warden, which stays outside; the warden's child locks itself in, layer by layer,
and executes the program. No two programs share either. A layer that cannot be had is reported, with the reason, and
those that remain hold. The names of `LAYERS` can be left out by the request, for tests of the others.

The program passes by coming to its end. Leaving early, with whatever code, is failing. It runs in the interpreter that
reports its end: one that is written to forge that report can.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time

LAYERS = ("namespaces", "root", "user", "landlock", "seccomp")

# prctl, unshare, mount: include/uapi/linux
PDEATHSIG, DUMPABLE, NO_NEW_PRIVS, SECCOMP, SUBREAPER = 1, 4, 38, 22, 36
NEW = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "process": 0x20000000, "network": 0x40000000}
NEW_USER = 0x10000000
BIND, REC, PRIVATE, NOSUID, NODEV = 0x1000, 0x4000, 0x40000, 2, 4
RECURSIVE, EMPTY, RDONLY = 0x8000, 0x1000, 1
MOUNT_SETATTR, LANDLOCK = 442, 444  # and 445, 446; the same number on all architectures
LEAST_UID = 100_000  # of users that nobody else is


class Unavailable(Exception):
    """A layer cannot be had here."""


def call(name, *arguments):
    """A function of the C library; raises Unavailable with its errno in words."""
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except AttributeError:
        raise Unavailable(f"no {name} on {sys.platform}") from None
    plain = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    if (result := function(*plain)) < 0:
        raise Unavailable(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def readable():
    """What a program may read: the standard library, and libraries of the system that its extensions need."""
    wanted = {*sys.path, f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"}
    wanted |= {"/dev/null", "/dev/urandom"}
    found = []
    for path in sorted(filter(os.path.exists, wanted)):
        if not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


# --- layers -----------------------------------------------------------------------------------------------------------


def become(uid, folder):
    """Another user, whom nothing belongs to but the folder."""
    os.setgroups([])
    try:
        os.seteuid(uid)
    except OSError:
        uid = 65534  # a container that maps few users
        os.seteuid(uid)
    closed = not os.access(os.__file__, os.R_OK, effective_ids=True)
    os.seteuid(0)
    if closed:
        raise Unavailable(f"{os.path.dirname(os.__file__)} is closed to other users")
    os.chown(folder, uid, uid)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    call("prctl", DUMPABLE, 1, 0, 0, 0)  # else the files of this process in /proc belong to root


def step_down(layers, request, folder):
    """Stop being root, if that can be."""
    attempt(layers, "user", lambda: become(LEAST_UID + request["number"], folder), request)
    request["root"] = layers["user"] is not True


def sacrificed():
    """The kernel kills this process first where memory runs out."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def namespaces(user):
    """No network, no other processes, mounts of its own; of the system's root, or within a namespace of users."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", sum(NEW.values()) | (NEW_USER if user else 0))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def root(folder, size):
    """A root of its own, read-only but for an empty /tmp in memory; in it what `readable` names, and nothing else."""

    def mount(source, target, kind, flags, data=None):
        texts = [each and os.fsencode(each) for each in (source, target, kind)]
        call("mount", *texts, flags, data and data.encode())

    mount(None, "/", None, REC | PRIVATE)
    mount("root", folder, "tmpfs", NOSUID | NODEV, "mode=755")
    for path in readable():
        target = folder + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "x").close()
        mount(os.path.realpath(path), target, None, BIND | REC)
    os.makedirs(f"{folder}/tmp", exist_ok=True)
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", RDONLY | NOSUID, 0, 0, 0), 32)
    call("syscall", MOUNT_SETATTR, -1, os.fsencode(folder), RECURSIVE, attributes, 32)
    mount("work", f"{folder}/tmp", "tmpfs", NOSUID | NODEV, f"size={size},nr_inodes=1000,mode=1777")
    os.chdir(folder)
    call("syscall", numbers()["pivot_root"], b".", b".")
    call("umount2", b".", 2)  # MNT_DETACH
    os.chdir("/tmp")


def landlock(folder):
    """Files outside `folder` are not written, and none but `readable` are read; no TCP, no signals to the outside."""
    version = call("syscall", LANDLOCK, None, 0, 1)
    rights = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    scoped = struct.pack("QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = call("syscall", LANDLOCK, ctypes.create_string_buffer(scoped, 24), size, 0)
    for path, allowed in [(folder, rights), *((each, 0b1101) for each in readable())]:
        allowed &= rights if os.path.isdir(path) else 0b0111  # execute, write and read file; read folder
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed | (2 if path == "/dev/null" else 0), beneath), 12)
        call("syscall", LANDLOCK + 1, ruleset, 1, rule, 0)
        os.close(beneath)
    call("syscall", LANDLOCK + 2, ruleset, 0)
    os.close(ruleset)


def numbers():
    """Numbers of the system calls that are named here, by this machine's architecture."""
    columns = {"x86_64": 0, "aarch64": 1}
    if platform.machine() not in columns:
        raise Unavailable(f"its system calls are not known for {platform.machine()}")
    return {name: pair[columns[platform.machine()]] for name, pair in CALLS.items()}


CALLS = {  # x86_64, aarch64 (asm/unistd_64.h, asm-generic/unistd.h)
    "clone": (56, 220), "prctl": (157, 167), "pivot_root": (155, 41), "clone3": (435, 435),
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "sendto": (44, 206), "io_uring_setup": (425, 425),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "memfd_create": (319, 279), "shmget": (29, 194), "msgget": (68, 186),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "setpriority": (141, 140), "ioprio_set": (251, 30),
}  # fmt: skip
REFUSED = sorted(set(CALLS) - {"clone", "clone3", "prctl"})


def seccomp(alone):
    """Sockets, signals, tracing, namespaces and memory beside the address space are refused with EPERM.

    `alone` refuses processes too, not threads: no limit counts those of root.
    """
    known = numbers()
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, refuse, absent, allow = ((give, 0, 0, code) for code in (0x80000000, 0x00050001, 0x00050026, 0x7FFF0000))
    argument = (load, 0, 0, 16)  # the first
    spaces, thread = NEW_USER | sum(NEW.values()) | 0x2000000 | 0x80, 0x10000

    def on(name, *then):
        return [(equal, 0, len(then), known[name]), *then]

    program = [(load, 0, 0, 4), (equal, 1, 0, arch), kill]  # calls of another machine
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), refuse]  # of x32
    for name in REFUSED:
        program += on(name, refuse)
    if alone and platform.machine() == "x86_64":
        program += [(equal, 0, 1, 57), refuse, (equal, 0, 1, 58), refuse]  # fork, vfork
    program += on("clone3", absent)  # its flags cannot be seen: the C library takes clone instead
    only_threads = [(any_bit, 1, 0, thread), refuse] if alone else []
    program += on("clone", argument, (any_bit, 0, 1, spaces), refuse, *only_threads, allow)
    program += on("prctl", argument, (equal, 0, 1, PDEATHSIG), refuse, allow)
    code = b"".join(struct.pack("HBBI", *each) for each in [*program, allow])
    held = ctypes.create_string_buffer(code, len(code))
    rules = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(held)))
    call("prctl", SECCOMP, 2, rules, 0, 0)


def limits(request):
    """The limits of this process and its children, which no child can raise."""
    for name, value in (
        ("AS", request["memory"]), ("FSIZE", request["file_bytes"]), ("NPROC", request["processes"]),
        ("CPU", int(request["seconds"]) + 2), ("NOFILE", 64), ("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0),
    ):  # fmt: skip
        if hasattr(resource, f"RLIMIT_{name}"):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


# --- the prisoner -----------------------------------------------------------------------------------------------------


def imprison(request, layers, report):
    """Lock this process in, and say on the pipe `report` which layers hold."""
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0) if sys.platform == "linux" else None
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.dup2(report, 3)
    os.closerange(4, 65536)
    os.environ.clear()
    attempt(layers, "first to be killed for memory", sacrificed)
    if layers["namespaces"] is True:
        attempt(layers, "root", lambda: root(request["folder"], request["file_bytes"]), request)
    else:
        layers["root"] = "no namespaces"
    limits(request)
    if request["root"]:
        step_down(layers, request, "/tmp" if layers["root"] is True else request["folder"])
    if sys.platform == "linux":
        call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
        call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # again: becoming another user forgets it
        call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    if layers["root"] is not True:
        attempt(layers, "landlock", lambda: landlock(os.getcwd()), request)
    attempt(layers, "seccomp", lambda: seccomp(request["root"]), request)
    os.write(3, json.dumps(layers).encode() + b"\n")


def attempt(layers, name, do, request=None):
    """Put up one layer; in `layers` stands True, or why it does not hold."""
    if request is not None and name in request["without"]:
        layers[name] = "left out"
        return
    try:
        do()
        layers[name] = True
    except (Unavailable, OSError) as error:
        layers[name] = str(error)


def execute(program):
    """Run the program to its end; returns "" or why it failed."""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
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


# --- the warden -------------------------------------------------------------------------------------------------------


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
