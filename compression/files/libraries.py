"""Libraries that open untrusted files: none may run code from them, and their errors become messages."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compression.files.strict_json import expanded


@contextmanager
def failures_as(error: Callable[[str], Exception]) -> Iterator[None]:
    """Whatever a library raises over what it was given, a panic of one in Rust included, becomes `error` of words."""
    try:
        yield
    except BaseException as caught:
        if not isinstance(caught, Exception) and type(caught).__module__ != "pyo3_runtime":
            raise  # an interrupt, or an exit
        raise error(f"{type(caught).__name__}: {str(caught)[:300]}") from caught


@contextmanager
def no_code_from_outside() -> Iterator[None]:
    """Within it transformers refuses code beside weights, and does not ask, also where another library calls it."""
    from transformers import dynamic_module_utils as theirs

    before = theirs.TIME_OUT_REMOTE_CODE
    theirs.TIME_OUT_REMOTE_CODE = 0  # seconds for an answer
    try:
        yield
    finally:
        theirs.TIME_OUT_REMOTE_CODE = before


def check_hub_cache(error: Callable[[str], Exception]) -> None:
    """Raise `error` where downloads would go into a folder that is called ~, for want of a home directory."""
    if not any(os.environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")):
        expanded("~", lambda why: error(f"there is no folder for downloads: {why}; or set HF_HOME"))


def local_or_hub(name: str, error: Callable[[str], Exception]) -> str:
    """What to tell a library that takes a folder or a hub id: the folder, ~ filled in, where there is one."""
    path = expanded(name, error)
    if not path.is_dir():
        check_hub_cache(error)
    return str(path) if path.is_dir() else name
