"""Calibrated tolerances of a device's timings: `<directory>/tolerances.json`.

    {"schema": 1, "digest": "...", "devices": {fingerprint: {"context": {...}, "rel": {metric: share}}}}

The tolerance that stands beside a metric is for a machine of which nothing is known. `python -m bench calibrate-gate
--write` puts in its place what unchanged reruns on this one, in several processes, differ by beyond what their rounds
tell. It is recorded before anything is judged by it, committed and reviewed as baselines are, and has their digest.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.errors import BaselineError
from bench.files import write_whole
from bench.gate.digest import check_digest, digest_of
from bench.metrics import Metric
from compression.files.strict_json import exact_fields, finite, strict_json

NAME = "tolerances.json"
SCHEMA = 1
MOST = 0.25  # share; a machine that needs more cannot tell a regression from its own noise


def read(directory: str | Path) -> dict[str, dict[str, Any]]:
    """What is recorded in a folder, by fingerprint; nothing where there is no such file. Raises as `load`."""
    path = Path(directory) / NAME
    return load(path) if path.exists() else {}


def load(path: str | Path) -> dict[str, dict[str, Any]]:
    """What a file records: {fingerprint: {"context": {...}, "rel": {metric: share}}}.

    Raises BaselineError, naming file and number, where it is damaged, unsigned or of another schema.
    """
    try:
        written = strict_json(Path(path).read_text(encoding="utf-8"))
        table = exact_fields(written, {"schema", "devices"}, frozenset({"digest"}))
        if table["schema"] != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, not {table['schema']!r}")
        if not isinstance(table["devices"], dict):
            raise ValueError("devices must be a table by fingerprint")
        for device, one in table["devices"].items():
            facts = exact_fields(one, {"context", "rel"})
            if not isinstance(facts["context"], dict) or not isinstance(facts["rel"], dict):
                raise ValueError(f"{device}: context and rel must be objects of names and values")
            for metric, share in facts["rel"].items():
                if not 0 < finite(share) <= MOST:
                    raise ValueError(f"{device}: {metric} must be above 0 and at most {MOST}, not {share!r}")
    except OSError as error:
        raise BaselineError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise BaselineError(
            f"{path}: {error}; restore it from version control, or delete it and record it again with `python -m bench "
            "calibrate-gate --write`"
        ) from None
    check_digest(written, path)
    return table["devices"]


def held(metrics: Mapping[str, Metric], directory: str | Path, fingerprint: str) -> dict[str, Metric]:
    """The metrics, with the tolerances of a device in place of their own where it has some. Raises as `read`."""
    own = read(directory).get(fingerprint, {"rel": {}})["rel"]
    return {name: replace(each, rel=own[name]) if name in own else each for name, each in metrics.items()}


def record(directory: str | Path, fingerprint: str, rel: Mapping[str, float], context: Mapping[str, Any]) -> Path:
    """Put the tolerances of a device in place of those that it had, and return the file's path.

    Raises BaselineError where one is above MOST, the file is damaged, or it cannot be written.
    """
    path = Path(directory) / NAME
    if above := {name: share for name, share in rel.items() if not 0 < share <= MOST}:
        said = ", ".join(f"{name} {100 * share:.3g} %" for name, share in above.items())
        raise BaselineError(
            f"{said}: no tolerance may be above {100 * MOST:.3g} %: on this machine, as it is now, a regression cannot "
            "be told from noise; nothing was written. Stop other work on it, pin the process to a processor "
            "(taskset, nice), and calibrate again"
        )
    devices = read(directory) | {fingerprint: {"context": dict(context), "rel": dict(sorted(rel.items()))}}
    table = {"schema": SCHEMA, "devices": dict(sorted(devices.items()))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(table | {"digest": digest_of(table)}, indent=2) + "\n").encode())
    except OSError as error:
        raise BaselineError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def words(directory: str | Path, fingerprint: str) -> str | None:
    """What times of a device are held to, None where only the metrics' own tolerances hold. Raises as `read`."""
    if (facts := read(directory).get(fingerprint)) is None:
        return None
    shares = ", ".join(f"{name.partition('.')[2]} {100 * share:.3g} %" for name, share in facts["rel"].items())
    return f"tolerances of {fingerprint}, calibrated in {facts['context'].get('reruns')} reruns: {shares}"
