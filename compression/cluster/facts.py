"""What must be the same on every machine of one run: `python -m compression.cluster.facts` prints it as JSON."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import compression
from compression.errors import CompressionError
from compression.files.atomic import code_digest

_DISTRIBUTIONS = ("compression-bench", "torch", "transformers", "bitsandbytes")


def facts(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, code, and what is seen of base and files, as JSON has them.

    Args:
        asked: `base`, its text; `paths` that must be there; `token`, a file that a machine without the same disk lacks.
    """
    return {
        "Python": platform.python_version(),
        **{name: _version(name) for name in _DISTRIBUTIONS},
        "code of compression": code_digest(Path(compression.__file__).parent),
        f"base {asked['base']}": _base(asked["base"]),
        **{f"path {path}": "there" if os.path.exists(path) else "missing" for path in asked["paths"]},
        f"folder {Path(asked['token']).parent}": _shared(asked["token"]),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _base(text: str) -> str:
    try:
        return compression.locate(text).fetch().digest
    except CompressionError as error:
        return f"not to be opened ({error})"


def _shared(token: str) -> str:
    folder = os.path.dirname(token)
    return "shared" if os.path.exists(token) and os.access(folder, os.W_OK) else "not the same disk, or read-only"


if __name__ == "__main__":
    print(json.dumps(facts(json.load(sys.stdin))))
