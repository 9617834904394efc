"""The exit statuses of all commands: the one table of them, from which docs/reference/exit-status.md is made."""

from typing import NamedTuple


class ExitStatus(NamedTuple):
    """What a status means: for `pytest bench` and `.ci/run`, and for `python -m bench` and `python -m compression`."""

    pytest: str
    module: str


EXIT_STATUSES = {
    0: ExitStatus("measured, and nothing fails against the baseline", "done"),
    1: ExitStatus(
        "a measurement failed, or the gate did: a row regressed, is missing or invalid, or base, text, data or seed "
        "differ from the baseline's; no baseline was written",
        "`baselines`: the changes were not confirmed, so nothing was written; `calibrate-gate`: it could not measure",
    ),
    2: ExitStatus(
        "interrupted, or an invalid recipe or list (4 where tests are named one by one)",
        "refused: invalid options or input; the message says why",
    ),
    3: ExitStatus("an internal error of pytest or of a plugin", "-"),
    4: ExitStatus(
        "refused before anything was measured: a damaged baseline, missing data or a missing base, changed files with "
        "`--update-baselines`; `.ci/run`: an unknown part",
        "-",
    ),
    5: ExitStatus("no test was selected", "-"),
    6: ExitStatus("more warnings than `--max-warnings` allows", "-"),
}
