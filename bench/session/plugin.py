"""The pytest plugin: markers, hooks and the fixture of the benchmarks; their options are in `session.command_line`.

It is an entry point of the installed package, so `pytest --pyargs bench` works in any repository; here it is also named
in conftest.py. Collecting imports neither torch nor transformers.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import compression
from bench.data.tasks.table import Task
from bench.errors import BenchError, OptionError
from bench.metrics.recovery import recipes_of
from bench.report.columns import WIDTH
from bench.report.write import measured, writable, write
from bench.results.run_options import declare
from bench.session import collection, command_line, summary, worker_place, workers
from bench.session import plan as run_plan
from bench.session.grid import worker as grid_worker
from bench.session.grid.driver import Driver
from bench.session.grid.worker import Measuring
from bench.session.progress import progress_of
from bench.session.refusals import refuse_early
from bench.session.session import Workbench
from compression.files.terminal import terminal

if TYPE_CHECKING:
    from bench.session.options import Options

_WORKBENCH = pytest.StashKey["Workbench"]()
_FAILING = pytest.StashKey[list[str]]()
_REPORTED = pytest.StashKey[list[Path]]()
_CONTROLLER = pytest.StashKey[workers.Controller]()
_DRIVER = pytest.StashKey[Driver]()
_MEASURING = pytest.StashKey[Measuring]()


MARKERS = {
    "efficiency": "size, speed, memory, energy and cost of compression",
    "quality": "perplexity and tasks",
    "rag": "answers from retrieved text",
    "judge": "how good and how clear answers are, by a judge and without one",
    "recovery": "a downstream task before and after training on it",
    "ordering": "size and perplexity of pruning, distillation and quantization in every order",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    declare(parser)


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Any:
    """With -n, and without --dist, a recipe belongs to one worker; a plan needs none. Workers of Ray are told."""
    if grid_worker.asked_for():
        config.stash[_MEASURING] = Measuring(config)
        config.pluginmanager.register(config.stash[_MEASURING])
    elif _by_ray(config) and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--ray and -n both share the recipes: give one of them")
    if getattr(config.option, "numprocesses", None):
        if config.getoption("--plan"):
            config.option.numprocesses = 0
        elif config.option.dist == "no" and not config.option.distload and workers.asks_for_benchmarks(config):
            config.option.dist = workers.GROUPED
    return (yield)


def _by_ray(config: pytest.Config) -> bool:
    """Whether other processes measure, on nodes of Ray; in those it is not."""
    return bool(config.getoption("--ray")) and _MEASURING not in config.stash


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "dist", "no") != "no" and not config.option.collectonly:
        config.stash[_CONTROLLER] = workers.Controller(config)
        config.pluginmanager.register(config.stash[_CONTROLLER])
    for name, what in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {what}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    collection.parametrize(metafunc)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    collection.arrange(config, items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Everything that can be refused is refused here, before the first expensive step."""
    config = session.config
    if not any("recipe" in getattr(getattr(item, "callspec", None), "params", {}) for item in session.items):
        return
    if "hypothesis" not in sys.modules and config.pluginmanager.has_plugin("hypothesispytest"):
        # its summary would import the whole library, at the cost of a second, for a run that has no property tests
        config.pluginmanager.unregister(name="hypothesispytest")
    if config.option.collectonly:
        return

    try:
        workbench = _opened(config, session.items)
        config.stash[_WORKBENCH] = workbench
        if worker_place.worker_of(config):
            config.pluginmanager.register(workers.Leaving(workbench))
        if _MEASURING in config.stash:
            config.stash[_MEASURING].workbench = workbench
        elif _by_ray(config):
            config.stash[_DRIVER] = Driver(config, workbench, session.items)
            config.pluginmanager.register(config.stash[_DRIVER])
    except (BenchError, compression.CompressionError) as error:
        if worker_place.worker_of(config):
            workers.refuse(session, terminal(error))
        raise pytest.UsageError(terminal(error)) from error


def _opened(config: pytest.Config, items: list[pytest.Item]) -> Workbench:
    """The run, once everything that it needs is known to be there. Raises what `refuse_early` does."""
    marked = {mark.name for item in items for mark in item.iter_markers()}
    options = _checked_options(config, items, marked)
    if config.getoption("--plan"):
        text = run_plan.plan(options, list(filter(None, map(_selected, items))))
        config.get_terminal_writer().line("\n" + "\n".join(map(terminal, text.splitlines())))
        pytest.exit("--plan: nothing was run", returncode=0)
    if config.getoption("--report"):
        writable(config.getoption("--report"))
    measuring, elsewhere = config.stash.get(_MEASURING, None), _by_ray(config)
    progress = None if elsewhere else (measuring.lines if measuring else progress_of)(config, options, len(items))
    workbench = Workbench(options, progress=progress)
    refuse_early(workbench, marked, dict.fromkeys(filter(None, map(_task_of, items))), base=not elsewhere)
    return workbench


def _checked_options(config: pytest.Config, items: list[pytest.Item], marked: set[str]) -> "Options":
    worker = worker_place.worker_of(config)
    if worker and worker.count > 1 and not worker.grouped:
        raise OptionError(
            "under pytest-xdist the benchmarks need --dist loadgroup, because each recipe belongs to one worker"
        )
    options = command_line.options_of(config)
    if options.against and not any(collection.AGAINST in getattr(item, "fixturenames", ()) for item in items):
        raise OptionError(
            f"--against {options.against}: no selected test generates against a commit; select "
            "test_efficiency.py::test_against, as -m efficiency does, or leave --against out"
        )
    if "recovery" not in marked:
        return options
    trained = {item.callspec.params["recipe"] for item in items if item.get_closest_marker("recovery")}  # type: ignore[attr-defined]
    derived = dict.fromkeys(each for recipe in options.recipes if recipe in trained for each in recipes_of(recipe))
    return dataclasses.replace(options, derived=tuple(derived))


def _selected(item: pytest.Item) -> run_plan.Selected | None:
    """A test of ours, for the plan."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    name = str(getattr(item, "originalname", "")).removeprefix("test_")
    return run_plan.Selected(name, params) if "recipe" in params else None


def _task_of(item: pytest.Item) -> Any:
    return getattr(getattr(item, "callspec", None), "params", {}).get("task")


@pytest.fixture(scope="session")
def workbench(request: pytest.FixtureRequest) -> "Workbench":
    """The run that measures, records and judges."""
    return request.config.stash[_WORKBENCH]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    controller, driver = config.stash.get(_CONTROLLER, None), config.stash.get(_DRIVER, None)
    if controller and controller.refused:
        session.exitstatus = pytest.ExitCode.USAGE_ERROR
    elif controller or (driver and not driver.refused):
        try:
            if gathered := (controller or driver).workbench():
                config.stash[_WORKBENCH] = gathered
        except BenchError as error:
            config.stash[_FAILING] = [str(error)]
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
    elif driver:
        config.stash[_WORKBENCH].close()
        del config.stash[_WORKBENCH]
    workbench = config.stash.get(_WORKBENCH, None)
    if workbench is None:
        return
    if worker_place.worker_of(config):
        workers.report(config, workbench)
        workbench.close()
        return
    interrupted = exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
    try:
        failing = workbench.finish(passed=exitstatus == pytest.ExitCode.OK, interrupted=interrupted)
    except BenchError as error:
        failing = [str(error)]
    workbench.close()
    if (directory := config.getoption("--report")) and workbench.rows:
        config.stash[_REPORTED] = _report(directory, workbench, failing)
    config.stash[_FAILING] = failing
    if failing and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _report(directory: Path, workbench: "Workbench", failing: list[str]) -> list[Path]:
    """The files of the report; what hinders it fails the run, and leaves its results as they are."""
    try:
        source = workbench.source
        rows, contents = measured(workbench.options.journal, source.label, workbench.fingerprint, source.digest)
        return write(directory, rows, contents, workbench.journal.run)
    except (
        BenchError,
        compression.CompressionError,
    ) as error:  # the latter: the journal has a recipe that is none any more
        failing.append(f"--report {directory}: {error}")
        return []


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """What pytest-benchmark stores has recipes and tasks by their names: it knows no way to write the objects."""

    def named(value: Any) -> Any:
        return value.text if isinstance(value, compression.Recipe) else value.name if isinstance(value, Task) else value

    for each in output_json["benchmarks"]:
        each["params"] = each["params"] and {name: named(value) for name, value in each["params"].items()}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    workbench = config.stash.get(_WORKBENCH, None)
    if workbench is not None:
        verbose = config.getoption("verbose") > 0
        terminalreporter.section("compression")
        for line in summary.lines(workbench, verbose, _width(terminalreporter)):
            terminalreporter.write_line(line)
        for path in config.stash.get(_REPORTED, []):
            terminalreporter.write_line(terminal(f"report: {path}"))
        failing = config.stash.get(_FAILING, [])
        *said, verdict = summary.ending(workbench, failing, verbose)
        for line in ["", *said]:
            terminalreporter.write_line(line, red=line.startswith("FAILED"))
        failed = "FAILED" in verdict
        terminalreporter.write_line(verdict, bold=True, red=failed, green=not failed)
        return
    for words in config.stash.get(_FAILING, []):
        terminalreporter.write_line(terminal(words), red=True)


def _width(terminalreporter: pytest.TerminalReporter) -> int:
    """The columns of the terminal, or those that were asked for; in a log as many as its tables need at most."""
    known = terminalreporter.isatty or "COLUMNS" in os.environ
    return max(60, terminalreporter._tw.fullwidth) if known else WIDTH
