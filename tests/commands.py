"""`pytest bench ...` in this process, in the folder of a `pytester`: a repository of somebody else's."""

from importlib.metadata import entry_points
from pathlib import Path

import bench

FILES = Path(bench.__file__).parent
# the run shares this process, where the package is imported already: pytest warns that it cannot rewrite its asserts
IN_PROCESS = ("-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")


def pytest_bench(pytester, *arguments):
    """The result of a run; where the package is not installed the plugin is named."""
    installed = any(point.value == "bench.plugin" for point in entry_points(group="pytest11"))
    plugin = () if installed else ("-p", "bench.plugin")
    return pytester.runpytest_inprocess(*plugin, *IN_PROCESS, *map(str, arguments))
