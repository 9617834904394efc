"""The layers of the sandbox that a process enters before it runs model-written code; see `bench.measure.sandbox.run`.

On the standard library alone. A layer that cannot be had is reported, with the reason, and those that remain hold. The
names of `LAYERS` can be left out by the request, for tests of the others.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

LAYERS = ("namespaces", "root", "user", "landlock", "seccomp")

# prctl, unshare, mount: include/uapi/linux
PDEATHSIG, DUMPABLE, NO_NEW_PRIVS, SECCOMP, SUBREAPER = 1, 4, 38, 22, 36
NEW = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "process": 0x20000000, "network": 0x40000000}
NEW_USER = 0x10000000
BIND, REC, PRIVATE, NOSUID, NODEV = 0x1000, 0x4000, 0x40000, 2, 4
RECURSIVE, RDONLY = 0x8000, 1
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
    column = columns[platform.machine()]
    tables = (CALLS | ATTRIBUTES | OF_ITSELF).items()
    return {name: pair[column] for name, pair in tables if pair[column] is not None}


CALLS = {  # x86_64, aarch64 (asm/unistd_64.h, asm-generic/unistd.h); None where there is none
    "clone": (56, 220), "prctl": (157, 167), "clone3": (435, 435), "fcntl": (72, 25), "ioctl": (16, 29),
    # sockets, and what goes through a pair of them to an address
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "sendto": (44, 206), "sendmsg": (46, 211),
    "sendmmsg": (307, 269), "io_uring_setup": (425, 425),
    # other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "getpgid": (121, 155), "getsid": (124, 156),
    "perf_event_open": (298, 241), "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsmount": (432, 432), "mount_setattr": (442, 442), "bpf": (321, 280), "syslog": (103, 116),
    # memory and queues beside the address space, of which others may have the number
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "userfaultfd": (323, 282), "shmget": (29, 194),
    "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219),
}  # fmt: skip
ATTRIBUTES = {  # what landlock does not see: modes, owners, times, attributes; before its version 3 truncate by name
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "file_setattr": (469, 469), "truncate": (76, 45),
}  # fmt: skip
OF_ITSELF = {  # calls whose first argument is a process: 0, the one that calls, is allowed
    "prlimit64": (302, 261), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
}  # fmt: skip
SIGNALLING = (8, 10, 15, 1024, 1026)  # of fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY
HARMLESS = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # of ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FION/FIOCLEX
REFUSED = sorted(set(CALLS) - {"clone", "clone3", "prctl", "fcntl", "ioctl"})


def seccomp(alone, shared):
    """Sockets, signals, tracing, namespaces, other processes and memory beside the address space give EPERM.

    `alone` refuses processes too, not threads: no limit counts those of root. `shared` is whether files outside can be
    reached by name, so that attributes of all files are refused, those of its own folder too.
    """
    known = numbers()
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    codes = (0x80000000, 0x00050001, 0x00050026, 0x00050019, 0x7FFF0000)
    kill, refuse, absent, no_terminal, allow = ((give, 0, 0, code) for code in codes)
    first, second = (load, 0, 0, 16), (load, 0, 0, 24)  # the lower halves of arguments, which are all of an int
    spaces, thread = NEW_USER | sum(NEW.values()) | 0x2000000 | 0x80, 0x10000

    def on(name, *then):
        return [(equal, 0, len(then), known[name]), *then] if name in known else []

    program = [(load, 0, 0, 4), (equal, 1, 0, arch), kill]  # calls of another machine
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), refuse]  # of x32
    for name in [*REFUSED, *(ATTRIBUTES if shared else ())]:
        program += on(name, refuse)
    for name in OF_ITSELF:
        program += on(name, first, (equal, 1, 0, 0), refuse, allow)
    if alone and platform.machine() == "x86_64":
        program += [(equal, 0, 1, 57), refuse, (equal, 0, 1, 58), refuse]  # fork, vfork
    program += on("clone3", absent)  # its flags cannot be seen: the C library takes clone instead
    only_threads = [(any_bit, 1, 0, thread), refuse] if alone else []
    program += on("clone", first, (any_bit, 0, 1, spaces), refuse, *only_threads, allow)
    program += on("prctl", first, (equal, 0, 1, PDEATHSIG), refuse, allow)
    program += on("fcntl", second, *(each for code in SIGNALLING for each in ((equal, 0, 1, code), refuse)), allow)
    program += on("ioctl", second, *(each for code in HARMLESS for each in ((equal, 0, 1, code), allow)), no_terminal)
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
    attempt(layers, "seccomp", lambda: seccomp(request["root"], layers["root"] is not True), request)
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
