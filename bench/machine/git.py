"""Git facts about the working folder: commit, changed files. Empty outside a repository, or without git."""

import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

from bench.errors import BaselineError
from bench.machine.environment import child_environment

UNCLEAN = "+"  # behind a commit: tracked files differed from it


def commit(besides: str | Path | None = None) -> str | None:
    """The commit of the working folder, with `UNCLEAN` if tracked files differ from it; None outside a repository.

    Files below `besides`, where baselines are recorded one after another, may differ.
    """
    try:
        return _git("rev-parse", "--short=12", "HEAD").strip() + (UNCLEAN if changed(besides) else "")
    except (OSError, subprocess.SubprocessError, BaselineError):
        return None


def changed(besides: str | Path | None = None) -> list[str]:
    """Tracked files that differ from the commit, but for those below `besides`; empty outside a repository.

    Files that git does not track are not looked at. Raises BaselineError where there is a repository of which git
    cannot tell, as of one that another user owns.
    """
    try:
        root = Path(_git("rev-parse", "--show-toplevel").rstrip("\n"))
        if not _git("rev-list", "-n1", "--all"):  # nothing was ever committed
            return []
        names = _git("status", "--porcelain=v1", "-z", "-uno", "--no-renames").split("\0")
    except FileNotFoundError:
        return []
    except subprocess.CalledProcessError as error:
        if "not a git repository" in error.stderr:
            return []
        raise BaselineError(f"git cannot tell which files have changed: {error.stderr.strip()}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise BaselineError(f"git cannot tell which files have changed: {error}") from None
    own = None if besides is None else Path(besides).resolve()
    paths = [name[3:] for name in names if name]
    return [name for name in paths if own is None or not (root / name).resolve().is_relative_to(own)]


def resolved(revision: str, folder: str | Path) -> str:
    """The first 12 digits of a commit of the repository that `folder` is in. Raises BaselineError where it has none."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "--verify", "--end-of-options", f"{revision}^{{commit}}"],
            cwd=folder, env=_environment(), capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise BaselineError(f"git knows no commit {revision!r}: {error.stderr.strip()}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise BaselineError(f"git cannot look up {revision!r}: {error}") from None
    return done.stdout.strip()


def export(revision: str, folder: str | Path, into: str | Path) -> None:
    """Write `folder`, as it was at a commit, below `into`. Raises BaselineError where git does not know it."""
    folder = Path(folder)
    try:
        archive = subprocess.run(
            ["git", "archive", "--format=tar", revision, "--", "."],
            cwd=folder, env=_environment(), capture_output=True, check=True, timeout=60,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        why = error.stderr.decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError) as error:
        why = str(error)
    else:
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
            files.extractall(into, filter="data")
        return
    raise BaselineError(
        f"{folder} at {revision!r} cannot be read: {why}; give a folder, or a commit of this repository"
    )


def subjects() -> dict[str, str]:
    """The first line of each commit's message, by its 12 digits; empty outside a repository."""
    try:
        lines = _git("log", "--all", "--abbrev=12", "--format=%h %s").splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {line[:12]: line[13:] for line in lines}


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", *arguments], env=_environment(), capture_output=True, text=True, check=True,
        timeout=30,
    )  # fmt: skip
    return done.stdout


def _environment() -> dict[str, str]:
    return child_environment(LC_ALL="C")  # its words are read
