"""`pytest bench ...` as others run it: in this process, in a repository of theirs; names of what it may measure."""

from importlib.metadata import entry_points
from pathlib import Path

import bench

FILES = Path(bench.__file__).parent
SIZE = f"{FILES / 'test_efficiency.py'}::test_size"
SPEED = f"{FILES / 'test_efficiency.py'}::test_generation"
ENERGY = f"{FILES / 'test_efficiency.py'}::test_energy"
PERPLEXITY = f"{FILES / 'test_quality.py'}::test_perplexity"
RTN = "rtn(group_size=32)"
QUICK = ("--runs", "2", "--warmup-runs", "0", "--prompt-tokens", "8", "--max-new-tokens", "4")
# the run shares this process, where the package is imported already: pytest warns that it cannot rewrite its asserts
IN_PROCESS = ("-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")


def pytest_bench(pytester, *arguments):
    """The result of a run in the folder of a `pytester`; where the package is not installed the plugin is named."""
    installed = any(point.value == "bench.session.plugin" for point in entry_points(group="pytest11"))
    plugin = () if installed else ("-p", "bench.session.plugin")
    return pytester.runpytest_inprocess(*plugin, *IN_PROCESS, *map(str, arguments))
