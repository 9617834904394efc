"""`python -m bench mend`: repairs a journal; damaged lines are moved aside, all others stay.

A file that holds a damaged line is kept as it is under another name, `journal.jsonl.damaged`; a new one takes its place
with all lines that are whole, those included that only lost the line end between them. Nothing is ever thrown away.
"""

import argparse
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from bench.commands.arguments import journal_option
from bench.errors import JournalError
from bench.files import write_whole
from bench.results.checksums import whole_in
from bench.results.journal_files import files_of, lines_of, name_of


def mend(path: str | Path) -> list[str]:
    """Mend all files of a journal; in words what was moved aside, by file and line, and nothing where all is whole.

    Raises JournalError where there is no journal, where a run is writing it, and where it cannot be written.
    """
    files = files_of(path)
    if not files:
        raise JournalError(f"the journal {path} does not exist; give another with --journal FILE")
    words, seen = [], set()
    for file in files:
        try:
            words += _mend(file, seen)
        except OSError as error:
            raise JournalError(f"the journal {file} cannot be repaired: {error.strerror or error}") from None
    return words


def _mend(file: Path, seen: set[bytes]) -> list[str]:
    with open(file, "rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{file} is being written by a run; repair it after the run has ended") from None
        kept, words = [], []
        for line in lines_of(file, seen):
            if line.record is not None:
                kept.append(line.text)
                continue
            found = [each for each in whole_in(line.text) if name_of(each) not in seen]
            seen.update(map(name_of, found))
            kept += found
            rest = f"; {len(found)} whole records in it are kept" if found else ""
            words.append(f"{file}:{line.number}: {line.why}{rest}")
        if words:
            aside = _set_aside(file)
            write_whole(file, b"".join(each + b"\n" for each in kept))
            words.append(f"{file}: {len(kept)} records kept; as it was: {aside}")
        return words


def _set_aside(file: Path) -> Path:
    """A second name for the file as it is, one that is free."""
    number = 0
    while True:
        aside = file.with_name(f"{file.name}.damaged" + (f".{number}" if number else ""))
        try:
            os.link(file, aside)
            return aside
        except FileExistsError:
            number += 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Move damaged lines of a journal aside and keep the rest."""
    parser = argparse.ArgumentParser(prog="python -m bench mend", description=main.__doc__)
    journal_option(parser)
    options = parser.parse_args(arguments)
    try:
        words = mend(options.journal)
    except JournalError as error:
        parser.error(str(error))
    print("\n".join(words) or f"{options.journal}: nothing is damaged")
