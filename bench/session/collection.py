"""Which measurements a run has: tests for each recipe, task, size and runtime that is asked for, in order."""

from typing import Any

import pytest

from bench.errors import OptionError
from bench.report.recipe_lists import has_a_line
from bench.results.row import NATIVE
from bench.session.command_line import (
    asked_batch_sizes,
    asked_request_rates,
    asked_runtimes,
    asked_tasks,
    may_have_cuda,
)
from bench.session.selection import select
from compression.files.terminal import terminal

AGAINST = "against"  # the parameter of what is measured with --against alone
_RATE = "request_rate"  # that of what is measured with --request-rate alone
_RUNTIME = "runtime"  # the parameter of what engines serve


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Recipes, tasks, batch sizes, runtimes and rates, as options ask for them."""
    if "recipe" in metafunc.fixturenames:
        try:
            recipes = select(metafunc.config).recipes
            batch_sizes, runtimes = asked_batch_sizes(metafunc.config), asked_runtimes(metafunc.config)
            rates = asked_request_rates(metafunc.config)
        except ValueError as error:
            raise pytest.Collector.CollectError(terminal(error)) from error
        metafunc.parametrize("recipe", recipes, ids=[recipe.text for recipe in recipes], scope="session")
        if {"task", "tasks"} & set(metafunc.fixturenames):
            _parametrize_tasks(metafunc)
        if "batch_size" in metafunc.fixturenames:
            metafunc.parametrize("batch_size", batch_sizes, ids=[f"b{size}" for size in batch_sizes])
        if AGAINST in metafunc.fixturenames:
            metafunc.parametrize(AGAINST, [metafunc.config.getoption("--against")])
        if _RATE in metafunc.fixturenames:
            metafunc.parametrize(_RATE, rates or [None])
        if _RUNTIME in metafunc.fixturenames:
            metafunc.parametrize(_RUNTIME, [each for each in runtimes if each != NATIVE] or [NATIVE])
        if "mode" in metafunc.fixturenames:
            metafunc.parametrize("mode", ("eager", "graph") if may_have_cuda(metafunc.config) else ("eager",))


def _parametrize_tasks(metafunc: pytest.Metafunc) -> None:
    """A test for each task, one for their average."""
    try:
        chosen = asked_tasks(metafunc.config)
    except OptionError as error:
        raise pytest.Collector.CollectError(terminal(error)) from error
    if "task" in metafunc.fixturenames:
        metafunc.parametrize("task", chosen, ids=[task.name for task in chosen])
    else:
        metafunc.parametrize("tasks", [metafunc.config.getoption("--tasks")] if chosen else [])


def arrange(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All measurements of a recipe follow each other, so that it is compressed once; other tests keep their places."""
    for name, option in ((AGAINST, "--against"), (_RATE, "--request-rate")):
        if not config.getoption(option):
            _leave_out(config, items, [item for item in items if name in getattr(item, "fixturenames", ())])
    _keep_runtimes(config, items)
    if config.getoption("--tasks") == "none":
        unasked = [item for item in items if {"recipe", "task", "tasks"} & set(getattr(item, "fixturenames", ()))
                   > {"recipe"}]  # fmt: skip
        _leave_out(config, items, unasked)
    if config.getoption("--model") == "report":
        _keep_what_tables_show(config, items)
    ours = [i for i, item in enumerate(items) if "recipe" in _params(item)]
    order: dict[Any, int] = {}
    for i in ours:
        order.setdefault(_params(items[i])["recipe"], len(order))
    served = {name: place for place, name in enumerate(asked_runtimes(config) if ours else (), 1)}

    def place(item: pytest.Item) -> tuple[int, int]:
        params = _params(item)
        return order[params["recipe"]], served.get(params.get(_RUNTIME, NATIVE), 0) if _RUNTIME in params else 0

    ranked = sorted((items[i] for i in ours), key=place)
    for i, item in zip(ours, ranked, strict=True):
        items[i] = item


def _keep_runtimes(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What engines serve is measured if they are asked for, what this package runs if it is."""
    ours = {item: params for item in items if "recipe" in (params := _params(item))}
    wanted = asked_runtimes(config) if ours else ()
    _leave_out(config, items, [
        item for item, params in ours.items()
        if (params.get(_RUNTIME) == NATIVE) or (_RUNTIME not in params and NATIVE not in wanted)
    ])  # fmt: skip


def _params(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _leave_out(config: pytest.Config, items: list[pytest.Item], unasked: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=unasked)
    items[:] = [item for item in items if item not in unasked]


def _keep_what_tables_show(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of `--model report` what no table has a line for is not measured."""
    listed = select(config).listed

    def shown(item: pytest.Item) -> bool:
        recipe = getattr(getattr(item, "callspec", None), "params", {}).get("recipe")
        return recipe is None or has_a_line(listed[recipe.text], {mark.name for mark in item.iter_markers()})

    _leave_out(config, items, [item for item in items if not shown(item)])
