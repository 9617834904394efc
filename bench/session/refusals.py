"""What a run needs, opened before its first expensive step: whatever is missing is refused now, in words."""

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from bench.errors import NotAvailable
from bench.measure.perplexity_windows import PerplexityProtocol

if TYPE_CHECKING:
    from bench.data.tasks.table import Task
    from bench.session.session import Workbench


def refuse_early(workbench: "Workbench", marked: set[str], tasks: "Iterable[Task]", base: bool = True) -> None:
    """Open the inputs of what was selected; what is not available for a row to say so is left to that row.

    Args:
        marked: the markers of the selected tests.
        tasks: those that are scored.
        base: whether to open the base and what needs it, too; other processes do where they measure.

    Raises:
        BenchError, CompressionError: text, questions, an encoder or a checkpoint that is missing or does not fit.
    """
    if "recovery" in marked:
        with suppress(NotAvailable):
            _open(workbench, "downstream")
    if "quality" in marked:
        protocol = PerplexityProtocol(**workbench.options.protocol)
        workbench.data.source(protocol.split, what=protocol.what)
        for task in tasks:
            with suppress(NotAvailable):
                workbench.task(task)
    if "rag" in marked:
        _open(workbench, "collection")
    if "judge" in marked:
        with suppress(NotAvailable):
            _open(workbench, "judging")
        _open(workbench, "coherence", *["small_model"] * bool(workbench.options.judge.fluency))
    if not base:
        return
    _open(workbench, "base")
    if "rag" in marked:
        _open(workbench, "retrieved")
    if "judge" in marked:
        with suppress(NotAvailable):
            _open(workbench, "asked")


def _open(workbench: "Workbench", *inputs: str) -> None:
    """Inputs are cached properties: reading one opens it."""
    for name in inputs:
        getattr(workbench, name)
