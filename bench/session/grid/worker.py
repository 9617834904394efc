"""A process on a node: `pytest bench` as the driver was given it, which measures the recipes that it is asked for.

It collects and opens what a run of all recipes does, once, and runs the tests of one recipe after another. What was
measured is in a journal file of its own; to the driver it tells reports of tests, for its summary, and progress.
"""

import json
import os
from typing import TYPE_CHECKING

import pytest

from bench.session import workers
from bench.session.progress import Lines
from bench.session.worker_place import KEY
from compression.cluster.channel import Channel

if TYPE_CHECKING:
    from bench.session.options import Options
    from bench.session.session import Workbench

TOLD = "COMPRESSION_BENCH_WORKER"  # variable: what the driver tells, a `Worker` in JSON


def asked_for() -> bool:
    """Whether a driver started this process."""
    return TOLD in os.environ


class Measuring:
    """The plugin of such a process; made before pytest configures other plugins, which ask for `workerinput`."""

    def __init__(self, config: pytest.Config):
        self._config, self._channel = config, Channel()
        self.workbench: Workbench | None = None
        config.workerinput = {KEY: json.loads(os.environ.pop(TOLD)), "workerid": "ray"}  # type: ignore[attr-defined]
        config.workeroutput = {}  # type: ignore[attr-defined]
        if hasattr(config.option, "benchmark_disable"):
            config.option.benchmark_disable = True  # as under pytest-xdist: its files are not for several processes

    def lines(self, config: pytest.Config, options: "Options", measurements: int) -> Lines | None:
        """As `progress_of`, of long measurements alone, told to the driver."""
        if config.getoption("verbose") < 0:
            return None
        lines = Lines(config, 0, measurements, write=lambda line: self._channel.answer(line=line))
        config.pluginmanager.register(lines)
        return lines

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        while (recipe := self._channel.next()) is not None:
            if self.workbench is not None:
                self.workbench.reread()
            items = [item for item in session.items if item.callspec.params["recipe"].text == recipe]  # type: ignore[attr-defined]
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.workbench is not None:
                self._channel.answer(told=workers.told_by(self.workbench))
            self._channel.answer(finished=recipe)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._channel.answer(report=told)

    def pytest_unconfigure(self) -> None:
        words = json.loads(self._config.workeroutput.get(KEY, "{}")).get("refused")  # type: ignore[attr-defined]
        if words:
            self._channel.answer(refused=words)
