"""Loads the benchmark plugin in a clone; where the package is installed its entry point has the same name."""

pytest_plugins = ["bench.session.plugin"]
