"""The process that was started: it has a Ray cluster measure each recipe, and is otherwise as a run without one.

Ray places the tasks and tries again those whose worker dies; what a dead worker had measured is in its journal file,
and the next one goes on from there. This process owns the run: it starts the journal, replays the reports of tests,
and judges, records and reports at the end from what the journal has by then.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from bench.errors import BenchError, OptionError
from bench.machine import device as machine
from bench.results.journal import now
from bench.results.row import REFUSED
from bench.session import plan as run_plan
from bench.session import workers
from bench.session.grid import facts, worker
from bench.session.progress import spelled
from bench.session.worker_place import Worker
from compression import CompressionError
from compression.cluster import node
from compression.cluster.ray import (
    Cluster,
    Needs,
    at_once,
    check_fits,
    connected,
    count,
    environment,
    library,
    token_in,
)
from compression.files.terminal import terminal

if TYPE_CHECKING:
    from bench.session.session import Workbench

_KILLED = (
    "the worker that measured this was killed, or ended without a message, as often as Ray tries again; the lines on "
    "top name it. Often memory ran out (see the system's log of the node), or a driver failed"
)
_LOOK_S = 0.5  # between two looks at what workers tell


def needs_of(workbench: "Workbench") -> dict[str, Needs]:
    """What measuring each recipe takes, by its text: the threads of this process, a GPU if the device is one, and
    memory as `--plan` counts it beside what this process holds by now, libraries above all.

    Raises:
        CompressionError: a recipe cannot be.
        OptionError: a recipe needs more memory than a GPU has.
    """
    import torch

    options = workbench.options
    base_bytes, plans, _ = run_plan.planned(options, workbench.source)
    gpu = options.device.startswith("cuda")
    process = psutil.Process().memory_info().rss
    found = {}
    for recipe in options.recipes:
        known = plans.get(recipe.text)
        at_most = base_bytes if known is None else run_plan.memory_at_once(known, options.device)
        if gpu and at_most > (there := machine.memory_total(options.device)):
            raise OptionError(f"{recipe} needs {at_most / 2**30:.2f} GiB of a GPU, which has {there / 2**30:.2f} GiB")
        found[recipe.text] = Needs(torch.get_num_threads(), int(gpu), process + (base_bytes if gpu else at_most))
    return found


def shared_by(count: int) -> str | None:
    """Why no times can be taken where so many recipes are measured on one machine at a time, None where they can."""
    if count < 2:
        return None
    return (f"{REFUSED}: up to {count} recipes at a time share the CPUs of a machine; run without --ray, or with "
            "OMP_NUM_THREADS as many as a machine has")  # fmt: skip


def paths_in(words: Sequence[str], folder: str) -> list[str]:
    """The files and folders that a command line names, as it names them, which every node must see, too.

    >>> paths_in(["--base", "/", "--data=/tmp", "--model", "no/such"], "/")
    ['/', '/tmp']
    """
    named = [word.partition("=")[2] or word for word in words]
    return [word for word in dict.fromkeys(named) if "/" in word and os.path.exists(os.path.join(folder, word))]


class Driver:
    """The plugin of that process, in place of the loop that runs tests.

    Attributes:
        refused: whether nothing was measured, for a reason that was said.

    Raises:
        OptionError: a test has no recipe, or one GPU is named.
        ClusterError: Ray is not installed, or its address is none.
    """

    def __init__(self, config: pytest.Config, workbench: "Workbench", items: Sequence[pytest.Item]):
        library(config.getoption("--ray"))
        self._config, self._workbench = config, workbench
        self._groups: dict[str, list[pytest.Item]] = {}
        for item in items:
            recipe = getattr(getattr(item, "callspec", None), "params", {}).get("recipe")
            if recipe is None:
                raise OptionError(f"--ray runs benchmarks of recipes, and {item.nodeid} is none; run it without --ray")
            self._groups.setdefault(recipe.text, []).append(item)
        options = workbench.options
        if options.device.startswith("cuda:"):
            raise OptionError(f"--device {options.device}: under --ray each recipe has a GPU of Ray's choice; give "
                              "--device cuda")  # fmt: skip
        self._began, self.refused = now(options.journal), False
        self._start_s = time.monotonic()
        self._told: dict[str, Mapping[str, Any]] = {}
        self._starts: dict[str, int] = {}
        self._reported: set[tuple[str, str]] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed and not session.config.option.continue_on_collection_errors:
            return None  # the usual loop says so
        try:
            needs = {recipe: each for recipe, each in needs_of(self._workbench).items() if recipe in self._groups}
            with connected(self._config.getoption("--ray")) as cluster:
                self._measure(session, cluster, needs, self._checked(cluster, needs))
        except (BenchError, CompressionError) as error:
            self.refused = True
            raise pytest.UsageError(terminal(error)) from error
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        return True

    def _checked(self, cluster: Cluster, needs: Mapping[str, Needs]) -> dict[str, str]:
        """The variables of workers, once the nodes are known to have room and to be like this machine."""
        options = self._workbench.options
        check_fits(needs, cluster.nodes)
        gpu = options.device.startswith("cuda")
        shared = None if gpu else shared_by(at_once(needs, cluster.nodes))
        told = Worker(self._workbench.journal.run, 0.0, 0, len(self._groups), True, True, shared)
        threads = {"OMP_NUM_THREADS": str(next(iter(needs.values())).cpus)}
        folder = self._config.invocation_params.dir
        named = [*map(str, self._config.invocation_params.args), *filter(None, [options.data])]
        most = max(needs.values(), key=lambda each: each.memory)
        self._say(f"{count(len(self._groups), 'recipe')} for {count(len(cluster.nodes), 'node')} of Ray; each takes up "
                  f"to {most}")  # fmt: skip
        with token_in(options.journal.absolute().parent) as token:
            asked = {"base": options.base, "device": options.device, "token": token,
                     "paths": [str(folder), *paths_in(named, str(folder))]}  # fmt: skip
            cluster.check_alike(facts.__name__, asked, facts.facts(asked), environment(**threads), [*needs.values()])
        return environment(**threads, **{worker.TOLD: json.dumps(told._asdict())})

    def _measure(
        self, session: pytest.Session, cluster: Cluster, needs: Mapping[str, Needs], variables: Mapping[str, str]
    ) -> None:
        from ray.util.queue import Queue

        self._workbench.announce()
        queue = Queue(actor_options={"num_cpus": 0, "name": "what workers tell"})
        command = ["-m", "pytest", *map(str, self._config.invocation_params.args)]
        start = (command, str(self._config.invocation_params.dir), dict(variables))
        pending = {}
        for recipe in self._groups:
            task, keep = cluster.task(node.ask_kept, recipe, needs[recipe]), not needs[recipe].gpus
            pending[task.remote(recipe, start, queue.actor, keep)] = recipe
        try:
            while pending and not (session.shouldfail or session.shouldstop):
                done, _ = cluster.ray.wait([*pending], timeout=_LOOK_S)
                for recipe, answer in queue.get_nowait_batch(queue.qsize()):
                    self._say_what(recipe, answer)
                    self._heard(recipe, answer)
                for task in done:
                    self._ended(cluster, task, pending.pop(task), len(pending))
        finally:
            for task in pending:
                cluster.ray.cancel(task, force=True)

    def _say_what(self, recipe: str, answer: Mapping[str, Any]) -> None:
        """Progress: the worker of a recipe starts, or is within a long measurement."""
        if "started" in answer:
            self._starts[recipe] = self._starts.get(recipe, 0) + 1
            again = " again, since its worker died," if self._starts[recipe] > 1 else ""
            self._say(f"{recipe}: started{again} on {answer['started']}")
        if "line" in answer:
            self._say(answer["line"], stamp=False)

    def _heard(self, recipe: str, answer: Mapping[str, Any]) -> None:
        """What is in no journal: reports of tests, and what a summary prints. A second time it changes nothing."""
        if "refused" in answer:
            raise OptionError(answer["refused"])
        if "told" in answer:
            self._told[recipe] = answer["told"]
        if "report" in answer:
            hook = self._config.hook
            self._replay(hook.pytest_report_from_serializable(config=self._config, data=answer["report"]))

    def _replay(self, report: pytest.TestReport) -> None:
        """A report as if the test had run here; those of a second try that were there before are not told twice."""
        if (report.nodeid, report.when) in self._reported:
            return
        self._reported.add((report.nodeid, report.when))
        hook = self._config.hook
        if report.when == "setup":
            hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
        hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)

    def _ended(self, cluster: Cluster, task: Any, recipe: str, left: int) -> None:
        try:
            for answer in cluster.get(task):
                self._heard(recipe, answer)
        except CompressionError as error:
            words = f"{recipe}: its worker died {self._starts.get(recipe, 0)} times: {str(error).splitlines()[-1]}"
            self._say(words)
            for item in self._groups[recipe]:
                if (item.nodeid, "teardown") not in self._reported:
                    self._replay(
                        pytest.TestReport(item.nodeid, item.location, {}, "failed", f"{words}\n{error}", "call")
                    )
        taken = spelled(time.monotonic() - self._start_s)
        self._say(f"{recipe}: finished; {len(self._groups) - left} of {len(self._groups)} recipes after {taken}")

    def _say(self, text: str, stamp: bool = True) -> None:
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        if reporter is not None and self._config.getoption("verbose") >= 0:
            reporter.ensure_newline()
            reporter.write_line(terminal(f"[{time.strftime('%H:%M:%S')}] {text}" if stamp else text))

    def workbench(self) -> "Workbench":
        """The whole run, out of the journal. Raises BenchError where that cannot be read."""
        self._workbench.gather(since=self._began, killed=_KILLED)
        for told in self._told.values():
            workers.take_over(self._workbench, told)
        return self._workbench
