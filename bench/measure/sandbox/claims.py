"""The claims of the sandbox, each with the attempts that would break it.

An attempt is a program that passes where it is not forbidden; a claim holds where none of its attempts passes. The
words in braces are what `surroundings` has: files, processes and sockets of this process, made to be attacked.
"""

import ctypes
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_WRITE = """import os
done = 0
for place in {places!r}:
    try:
        open(os.path.join(place, 'sandbox-probe'), 'w').close()
        os.unlink(os.path.join(place, 'sandbox-probe'))
        done += 1
    except OSError: pass
assert done
"""
_SIGNAL = """import fcntl, os
hear, tell = os.pipe()
fcntl.fcntl(hear, {how}, {owner})
fcntl.fcntl(hear, 10, 9)
fcntl.fcntl(hear, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
os.write(tell, b'x')
"""
_LIBRARY = "import os, struct, fcntl\nfile = os.open(os.__file__, os.O_RDONLY)\nas_is = os.fstat(file)\n"
_IPC = "import ctypes\nc = ctypes.CDLL(None)\n"
LIMITS = {
    "run longer than they may": ("while True: pass",),
    "fill the memory": ("x = bytearray({memory} + 1)",),
    "write large files": (
        "import os\nos.write(os.open('x', os.O_CREAT | os.O_RDWR), b'x' * {file_bytes})\n"
        "assert os.write(os.open('x', os.O_APPEND | os.O_RDWR), b'x')",
    ),
    "start processes without end": (
        "import os, time\nfor _ in range({processes} + 1):\n    if not os.fork(): time.sleep(60)",
    ),
}
_ENVIRONMENT = {"see the environment": ("import os; assert os.environ",)}
WITHOUT_LAYERS = (*LIMITS, *_ENVIRONMENT)  # claims that hold where every layer is left out
CLAIMS: dict[str, tuple[str, ...]] = (
    LIMITS
    | _ENVIRONMENT
    | {
        "write outside their folder": (
            _WRITE,
            "open({file!r}, 'a').write('x')",
            "import os; os.truncate({file!r}, 1)",
            "import os; os.rename({file!r}, {file!r} + '.new'); os.rename({file!r} + '.new', {file!r})",
            "import os; os.link({file!r}, 'here')",
            "import os; os.symlink('x', {folder!r} + '/link'); os.unlink({folder!r} + '/link')",
            "import os; os.mkdir({folder!r} + '/made'); os.rmdir({folder!r} + '/made')",
            "import os; os.mkfifo({folder!r} + '/pipe'); os.unlink({folder!r} + '/pipe')",
        ),
        "set modes, owners, times or attributes of files outside": (
            "import os; os.chmod({file!r}, 0o666)",
            "import os; os.chown({file!r}, -1, -1)",
            "import os; os.lchown({file!r}, -1, -1)",
            "import os; os.utime({file!r}, (1, 1))",
            "import os; os.setxattr({file!r}, 'user.sandbox', b'x')",
            "import os; os.setxattr({file!r}, 'user.sandbox', b'x'); os.removexattr({file!r}, 'user.sandbox')",
            _LIBRARY + "os.fchmod(file, as_is.st_mode & 0o7777)",
            _LIBRARY + "os.fchown(file, -1, -1)",
            _LIBRARY + "os.utime(file, ns=(as_is.st_atime_ns, as_is.st_mtime_ns))",
        ),
        "read other files": ("open({file!r}).read()",),
        "see that other files are there": ("import os; os.stat({file!r})", "import os; os.listdir({folder!r})"),
        "open sockets": ("import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",),
        "reach this machine by network": ("import socket; socket.create_connection(('127.0.0.1', {port}), 1)",),
        "reach sockets of others by their path": (
            "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', {socket!r})",
            "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendmsg([b'x'], [], 0, {socket!r})",
        ),
        "see other processes": ("import os; os.stat('/proc/{victim}')", "import os; os.getpgid({victim})"),
        "kill other processes": (
            "import os; os.kill({doomed}, 0)",
            "import signal, os; signal.pidfd_send_signal(os.pidfd_open({doomed}), 0)",
            "import resource; resource.prlimit({doomed}, resource.RLIMIT_CPU, (0, 0))",
            _SIGNAL.replace("{how}", "8").replace("{owner}", "{doomed}"),
            _SIGNAL.replace("{how}", "15").replace("{owner}", "__import__('struct').pack('ii', 1, {doomed})"),
        ),
        "change limits, priorities or places of other processes": (
            "import resource; resource.prlimit({victim}, resource.RLIMIT_NOFILE, (64, 64))",
            "import os; os.sched_setaffinity({victim}, os.sched_getaffinity({victim}))",
            "import os; os.sched_setscheduler({victim}, 0, os.sched_param(0))",
            "import os; os.setpriority(os.PRIO_PROCESS, {victim}, 19)",
        ),
        "reach System V memory of others": (
            _IPC + "c.shmat.restype = ctypes.c_void_p\nassert c.shmat({shared}, None, 0) != 2**64 - 1",
            _IPC + "made = c.semget(0, 1, 0o1600)\nassert made >= 0\nc.semctl(made, 0, 0)",
        ),
        "be root": ("import os; os.setuid(0); assert os.getuid() == 0",),
    }
)


@contextmanager
def surroundings() -> Iterator[dict[str, Any]]:
    """What attempts are made on: a file, a folder, a process, sockets and shared memory that belong to this process."""
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-outside-")))
        folder.chmod(0o777)
        (file := folder / "mine.txt").write_text("mine")
        file.chmod(0o644)
        server = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        listening = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        listening.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        victim, doomed = (held.enter_context(_sleeper()) for _ in range(2))
        yield {
            "file": str(file), "folder": str(folder), "socket": str(folder / "socket"), "victim": victim,
            "doomed": doomed, "port": server.getsockname()[1], "shared": held.enter_context(_shared_memory()),
            "places": [str(folder), "/", os.path.expanduser("~"), str(Path(__file__).parent), "/var/tmp", "/dev/shm"],
        }  # fmt: skip


@contextmanager
def _sleeper() -> Iterator[int]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextmanager
def _shared_memory() -> Iterator[int]:
    """The number of a segment of System V memory; -1 where there is none."""
    library = ctypes.CDLL(None)
    number = library.shmget(0, 4096, 0o1600) if hasattr(library, "shmget") else -1
    try:
        yield number
    finally:
        if number >= 0:
            library.shmctl(number, 0, None)


def attempts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Every claim with each of its attempts, as a program."""
    return [(claim, program.format(**facts)) for claim, programs in CLAIMS.items() for program in programs]
