"""Whether the inputs of a row (texts, teacher, task, judge) have changed since its baseline was recorded.

The key of a row has the digest of content that lies in a folder, so that an equal copy elsewhere is the same row, and a
changed text is another. That is no regression of the code, and no new row either: it is said that the text changed.
"""

from collections.abc import Iterable, Mapping

from bench.gate.entry import Entry
from bench.results.row import DIGITS, Input, Param, Row

WORDS = {"calibration": "the calibration text", "downstream": "the downstream task", "teacher": "the teacher",
         "data": "the data", "judge": "the judge", "lm": "the language model", "by": "the local model",
         "vectors": "the encoder", "encoder": "the encoder"}  # fmt: skip
COUNTS = frozenset({"items", "samples", "questions"})  # parameters that follow from a text


def inputs_changed(row: Row, entry: Entry | None, others: Iterable[Entry]) -> str | None:
    """What changed, in words; None where nothing did.

    `entry` is the one of the row's key; without one `others` are looked through for one of the same measurement on what
    goes by the same name.
    """
    if entry is not None:
        differ = {
            name: (then, now)
            for name, then in entry.inputs.items()
            if (now := row.inputs.get(name)) is not None and None not in (then.digest, now.digest)
            and then.digest != now.digest
        }  # fmt: skip
        return _words(differ) if differ else None
    for other in others:
        if other.metric == row.metric and (differ := _renewed(row, other)):
            return _words(differ)
    return None


def _renewed(row: Row, other: Entry) -> dict[str, tuple[Input, Input]]:
    """The inputs that differ and have their names still, where nothing else of the two keys differs; else none."""
    found = {}
    for name in {*row.params, *other.params} - (COUNTS if "data" in row.params else frozenset()):
        then, now = (_input(name, each.params, each.inputs) for each in (other, row))
        if row.params.get(name) == other.params.get(name):
            continue
        if then is None or now is None or then.name != now.name:
            return {}
        found[name] = (then, now)
    return found


def _input(name: str, params: Mapping[str, Param], inputs: Mapping[str, Input]) -> Input | None:
    """What a parameter is the digest of. That of a task's data has the task's name before it: `facts@1a2b3c4d`."""
    value = params.get(name)
    if name in inputs:
        return inputs[name]
    if name == "data" and isinstance(value, str) and "@" in value:
        return Input(*value.split("@", 1))
    return None


def _words(differ: Mapping[str, tuple[Input, Input]]) -> str:
    return "; ".join(
        f"{WORDS.get(name, name)} changed: {then.name} had the digest {str(then.digest)[:DIGITS]}, "
        f"{now.name} has {str(now.digest)[:DIGITS]}"
        for name, (then, now) in sorted(differ.items())
    )
