"""The digest of a baseline, and `python -m bench sign`, which accepts what was edited by hand.

The digest is of what a file says and not of its bytes: it may be laid out anew, but no number, name or condition in it
may change. An edit by hand is refused until it was signed, so that it is somebody's decision and seen in review.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import gate
from bench.errors import BaselineError
from bench.files import replacing
from compression.files.strict_json import signature_of, strict_json


def without_digest(table: Any) -> Any:
    """All that a baseline says but its digest; what is no table stays as it is."""
    return {name: each for name, each in table.items() if name != "digest"} if isinstance(table, dict) else table


def digest_of(table: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of a baseline without its digest, as JSON in order of names.

    >>> digest_of({"rows": {}, "digest": "?"}) == digest_of({"rows": {}})
    True
    """
    return signature_of(table)


def check_digest(table: Mapping[str, Any], path: str | Path) -> None:
    """Raises BaselineError, with the ways out, where a baseline is not what was recorded or signed.

    Schemas before 1 have no digest.
    """
    if "digest" not in table and table.get("schema") == 0:
        return
    was, now = table.get("digest"), digest_of(table)
    if was != now:
        why = f"its digest is {was!r}, its content has {now!r}" if was else "it has no digest"
        raise BaselineError(
            f"baseline {path} is not what was recorded: {why}; restore it from version control, or delete it and "
            f"record it again with --update-baselines; a change by hand is accepted with `python -m bench sign {path}`"
        )


def sign(path: Path) -> str | None:
    """Write the digest of what a file says into it; in words what was done, None where it was right.

    Only the digest changes. Raises BaselineError where the file is no sound baseline but for its digest.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = strict_json(text)
    except OSError as error:
        raise BaselineError(f"baseline {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise BaselineError(f"baseline {path}: {error}; only JSON can be signed") from None
    if not isinstance(table, dict):
        raise BaselineError(f"baseline {path}: it is not a table of names and values and cannot be signed")
    was, now = table.get("digest"), digest_of(table)
    if was == now:
        return None
    if isinstance(was, str) and was and text.count(json.dumps(was)) == 1:
        text = text.replace(json.dumps(was), json.dumps(now))
    else:
        text = json.dumps(table | {"digest": now}, indent=2, sort_keys=True) + "\n"
    try:
        with replacing(path) as beside:
            beside.write_text(text, encoding="utf-8")
            if path.name == gate.tolerances.NAME:
                gate.tolerances.load(beside)
            else:
                gate.baseline.Baseline.load(beside, items=path.stem)
    except BaselineError as error:
        raise BaselineError(str(error).replace(str(beside), str(path))) from None
    except OSError as error:
        raise BaselineError(f"baseline {path} cannot be written: {error.strerror or error}") from None
    return f"{path}: signed; the digest was {was!r}, is {now!r}"
