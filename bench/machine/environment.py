"""The environment that child processes get: without the key of a judge."""

import os

KEY = "BENCH_JUDGE_KEY"  # environment variable


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process, with changes, and without the key."""
    return {name: value for name, value in os.environ.items() if name != KEY} | changes
