"""A Ray cluster: connecting to it, what its nodes have, what tasks need, and whether the nodes are like this machine.

Whatever cannot be is said in words before the first task. Ray itself is imported when a cluster is asked for.
"""

import functools
import importlib
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import compression
from compression.cluster import node
from compression.errors import ClusterError, install_command

AUTO = "auto"
_ANSWER_S = 10  # for a connection; Ray itself tries for five minutes
_STORE = 10**8  # bytes of the object store of a cluster that is started here: only short messages pass
_SENT = ("BENCH_", "COMPRESSION_", "HF_", "MKL_", "OMP_", "PYTEST_", "TORCH")  # beginnings of variables
_KEPT_BACK = ("KEY", "TOKEN", node.CHANNEL, "PYTEST_CURRENT_TEST")  # in names; a key is set on nodes that need it


def count(number: int, what: str) -> str:
    """A number of things.

    >>> count(1, "node"), count(2, "node")
    ('1 node', '2 nodes')
    """
    return f"{number} {what}{'s' * (number != 1)}"


class Needs(NamedTuple):
    """What a task occupies while it runs; memory of the machine in bytes."""

    cpus: int
    gpus: int
    memory: int

    def __str__(self) -> str:
        return f"{count(self.cpus, 'CPU')}, {count(self.gpus, 'GPU')} and {self.memory / 2**30:.2f} GiB of memory"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or a part of one: `machine` is its address. It has what `has` says."""

    name: str
    machine: str
    has: Needs

    def lacks(self, needs: Needs) -> list[str]:
        """What is missing for a task, in words."""
        words = [count(need - has, what) for what, need, has in
                 (("CPU", needs.cpus, self.has.cpus), ("GPU", needs.gpus, self.has.gpus)) if need > has]  # fmt: skip
        if (short := needs.memory - self.has.memory) > 0:
            words.append(f"{short / 2**30:.2f} GiB of memory")
        return words


def address_of(text: str) -> str | None:
    """The address of a cluster, None for one that is started here for this run.

    Raises:
        ClusterError: it is none.

    >>> address_of("10.0.0.1:6379")
    '10.0.0.1:6379'
    """
    found = (os.environ.get("RAY_ADDRESS") or None) if text == AUTO else text
    if found in (None, "local"):
        return None
    if not re.fullmatch(r"[\w.\-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", found):
        raise ClusterError(f"--ray must be auto or the HOST:PORT of a cluster, not {found!r}"
                           + (" ($RAY_ADDRESS)" if text == AUTO else ""))  # fmt: skip
    return found


def check_fits(needs: Mapping[str, Needs], nodes: Sequence[Node]) -> None:
    """Refuse tasks, by name, that no node has room for.

    Raises:
        ClusterError: with what is missing where the least is.
    """
    if not nodes:
        raise ClusterError("no node takes tasks: none is alive that has a CPU; start one with ray start --num-cpus")
    for name, each in needs.items():
        lacking = [(lacks, node) for node in nodes if (lacks := node.lacks(each))]
        if len(lacking) < len(nodes):
            continue
        lacks, nearest = min(lacking, key=lambda pair: (len(pair[0]), -pair[1].has.memory))
        raise ClusterError(
            f"{name} needs {each}, and no node of the cluster has them: the nearest, {nearest.name[:8]}, has "
            f"{nearest.has}; missing: {', '.join(lacks)}. Start a node with more (ray start --num-cpus --num-gpus "
            "--memory), or leave it out"
        )


def at_once(needs: Mapping[str, Needs], nodes: Sequence[Node]) -> int:
    """How many of the tasks one machine may have to run at a time, by its CPUs."""
    smallest = min((each.cpus for each in needs.values()), default=1)
    places: dict[str, int] = {}
    for each in nodes:
        places[each.machine] = places.get(each.machine, 0) + int(each.has.cpus // smallest)
    return min(len(needs), max(places.values(), default=0))


def environment(**more: str) -> dict[str, str]:
    """The variables that processes on nodes are given: settings of this project and its libraries, where its code is.

    Keys and tokens are not sent.
    """
    root = Path(compression.__file__).parents[1]
    path = [*([] if "site-packages" in root.parts else [str(root)]), *filter(None, [os.environ.get("PYTHONPATH")])]
    sent = {name: value for name, value in os.environ.items()
            if name.startswith(_SENT) and not any(word in name for word in _KEPT_BACK)}  # fmt: skip
    return sent | ({"PYTHONPATH": os.pathsep.join(path)} if path else {}) | more


def differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> Sequence[str]:
    """What is another there than here, in words."""
    return [f"{name} is {_short(there.get(name))} there and {_short(value)} here" for name, value in here.items()
            if there.get(name) != value]  # fmt: skip


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


class Cluster:
    """A cluster that this process is connected to.

    Attributes:
        ray: the library.
        nodes: those that take tasks.
    """

    def __init__(self, ray: Any) -> None:
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(node)
        self.ray = ray
        self._remote = functools.cache(ray.remote)  # once for each function: what it keeps is kept with it
        self.nodes = [
            Node(each["NodeID"], each["NodeManagerAddress"],
                 Needs(int(has.get("CPU", 0)), int(has.get("GPU", 0)), int(has.get("memory", 0))))
            for each in ray.nodes() if each["Alive"] and (has := each["Resources"]).get("CPU", 0) >= 1
        ]  # fmt: skip

    def task(self, function: Any, name: str, needs: Needs) -> Any:
        """A function of `compression.cluster.node` as a task; Ray tries again where its worker or process dies."""
        return self._remote(function).options(
            name=name, num_cpus=needs.cpus, num_gpus=needs.gpus, memory=needs.memory,
            retry_exceptions=[ChildProcessError],
        )  # fmt: skip

    def check_alike(self, module: str, asked: Mapping[str, Any], here: Mapping[str, Any], variables: Mapping[str, str],
                    needs: Sequence[Needs]) -> None:  # fmt: skip
        """Refuse nodes that are unlike this machine: `python -m module` says there what `here` says.

        Only nodes that could take one of the tasks are asked.

        Raises:
            ClusterError: a node lacks the package, has other versions or code, or does not see the base or the files.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asking = self._remote(node.complete)
        answers = {}
        for each in self.nodes:
            if any(not each.lacks(need) for need in needs):
                place = NodeAffinitySchedulingStrategy(each.name, soft=False)
                answers[each] = asking.options(
                    name="check of the node", num_cpus=0, num_gpus=needs[0].gpus, scheduling_strategy=place
                ).remote(["-m", module], os.getcwd(), dict(variables), json.dumps(asked))
        for each, answer in answers.items():
            where = f"node {each.name[:8]} at {each.machine}"
            done = self.get(answer)
            if done["status"]:
                last = done["errors"].strip().splitlines()[-1:] or [f"status {done['status']}"]
                raise ClusterError(f"{where} cannot run this: {last[0]}; code, base and data must be there under the "
                                   "same paths, installed or on a shared disk")  # fmt: skip
            if words := differing(here, json.loads(done["output"].splitlines()[-1])):
                raise ClusterError(f"{where} is unlike this machine, so its results could not belong to one run: "
                                   f"{'; '.join(words)}")  # fmt: skip

    def get(self, answer: Any) -> Any:
        """The result of a task. Raises ClusterError, in the words of Ray, where it has none."""
        try:
            return self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            raise ClusterError(str(error).strip()) from error


def library(address: str) -> Any:
    """Ray itself, for a cluster at an address. Raises ClusterError where it is not installed, or that is no address."""
    address_of(address)
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ClusterError(f"--ray needs Ray ({error}): {install_command('ray')}") from error


@contextmanager
def connected(text: str) -> Iterator[Cluster]:
    """The cluster at an address (`address_of`), or one that is started here and ends with the block.

    Raises:
        ClusterError: Ray is not installed; no cluster answers; its versions of Python or Ray are others.
    """
    ray, address = library(text), address_of(text)
    given: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        given |= {"include_dashboard": False, "object_store_memory": _STORE}
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would measure what else runs on the machine
    else:
        _check_answers(address)
    try:
        ray.init(address=address or "local", **given)
    except (Exception, SystemExit) as error:
        raise ClusterError(f"Ray does not start, or refuses, at {address or 'this machine'}: {error}") from error
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no cluster answers at {address}: {error}; start one there with: ray start --head "
                           f"--port {port}, or give --ray auto") from error  # fmt: skip


@contextmanager
def token_in(folder: Path) -> Iterator[str]:
    """The path of a file that a machine sees if it has the same disk."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-") as file:
        yield file.name
