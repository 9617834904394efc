"""The trend of each metric over runs, from the journal and from the storage of pytest-benchmark."""

import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.errors import JournalError
from bench.results.bases import Identity, short
from bench.results.row import key_of
from compression.files.strict_json import finite, strict_json

DIGITS = 6  # significant ones that a value keeps


def runs(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs of a journal in order: id, start (UTC), how it ended, commit, command, base and number of rows."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        run = found.setdefault(record["run"], {
            "run": record["run"], "time": moment(record["time"]), "ended": "unfinished", "rows": 0,
            "base": None, "commit": None, "command": None,
        })  # fmt: skip
        if record["kind"] == "row":
            run["rows"] += 1
        elif record["kind"] == "end":
            run["ended"] = record["status"]
        elif record["kind"] == "run":
            run["ended"] = "unfinished"  # a run that is gone on with has not ended yet
            run |= {name: record["context"].get(name) for name in ("base", "commit", "command")}
    return list(found.values())


def history(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """Values over the runs: base, device, recipe and key of a row, and what `packed` makes of the values.

    Runs are counted as in `runs`; where a run has the row twice the last one counts. No row is read as a `Row`: there
    may be hundreds of thousands.
    """
    places: dict[str, int] = {}
    keys: dict[tuple[str, str], str] = {}  # of a few hundred names for hundreds of thousands of rows
    found: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for record in records:
        place = places.setdefault(record["run"], len(places))
        if record["kind"] == "row" and record["value"] is not None:
            named = record["metric"], str(record["params"])
            if named not in keys:
                keys[named] = key_of(record["metric"], record["params"])
            series = found.setdefault((record["base"], record["device"], record["recipe"], keys[named]), {})
            series[place] = record["value"]
    return _nested(found)


def stored(
    folder: Path, called: Mapping[Identity, str] | None = None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, dict[str, dict[str, str]]]]]:
    """The same of what pytest-benchmark saved (`--benchmark-autosave`): its runs, and medians of a round in seconds.

    `called` says what each base, by label and hash, is called beside others.
    The device is the folder that it keeps a machine's runs in. A folder that is not there has no runs. Raises
    JournalError for a file that is none of pytest-benchmark's.
    """
    files = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            content = strict_json(path.read_text())
            for each in content["benchmarks"]:
                info = dict(each["extra_info"])
                if not all(isinstance(info.get(name) or "", str) for name in ("recipe", "base", "base_hash")):
                    raise ValueError("recipe, base and base_hash must be strings")
                key_of("pytest_benchmark.round_s", info)
                finite(each["stats"]["median"])
            commit = (content.get("commit_info") or {}).get("id") or ""
            if not isinstance(content["datetime"], str) or not isinstance(commit, str):
                raise ValueError("datetime and commit must be strings")
            files.append((content["datetime"], path, content))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, JournalError) as error:
            raise JournalError(f"{path} is no storage of pytest-benchmark: {error!r}; remove it") from None
    listed, found = [], {}
    for place, (when, path, content) in enumerate(sorted(files, key=lambda each: each[:2])):
        commit = (content.get("commit_info") or {}).get("id") or ""
        listed.append({"run": path.stem, "time": when[:16].replace("T", " "), "commit": commit[:12]})
        for each in content["benchmarks"]:
            said = dict(each["extra_info"])
            if "recipe" not in said or "base" not in said:
                continue  # a benchmark of somebody else's
            recipe, base, base_hash = said.pop("recipe"), said.pop("base"), said.pop("base_hash", None)
            base = _name(base, base_hash, called or {})
            series = found.setdefault((base, path.parent.name, recipe, key_of("pytest_benchmark.round_s", said)), {})
            series[place] = each["stats"]["median"]
    return listed, _nested(found)


def _name(label: str, base_hash: str | None, called: Mapping[Identity, str]) -> str:
    """What a base is called; one of unknown hash by its label, another that only shares a label by its digits too."""
    others = any(known for name, known in called if name == label)
    unlike = base_hash is not None and others
    return called.get((label, base_hash)) or (f"{label} ({short(base_hash)})" if unlike else label)


def packed(series: Mapping[int, float]) -> str:
    """Values by number of the run as a short text: one for each run, `_3` for three runs without, `=3` for three more
    that are the same.

    >>> packed({2: 0.5, 3: 0.25, 4: 0.25, 5: 0.25, 7: 1 / 3})
    '_2 0.5 0.25 =2 _1 0.333333'
    """
    texts = [f"{series[place]:.{DIGITS}g}" if place in series else "_" for place in range(max(series) + 1)]
    words = []
    for text, same in groupby(texts):
        count = len(list(same))
        if text == "_":
            words.append(f"_{count}")
        else:
            words += [text, f"={count - 1}"] if count > 1 else [text]
    return " ".join(words)


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _nested(found: Mapping[tuple[str, str, str, str], Mapping[int, float]]) -> dict:
    tree: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    for (base, device, recipe, key), series in found.items():
        tree.setdefault(base, {}).setdefault(device, {}).setdefault(recipe, {})[key] = packed(series)
    return tree
