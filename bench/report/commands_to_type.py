"""Commands that measure the missing cells of a table, with the settings of the previous run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.report.escaping import shell, words_of
from bench.results.bases import label_of
from bench.results.run_options import OPTIONS, takes_value

if TYPE_CHECKING:
    from bench.results.records import Contents
    from bench.results.row import Row

SHORTENED = "…/ in a command stands for a local folder; replace it with your own."

_OF_A_RUN = frozenset({  # say what becomes of a run, or are in the recipes, and not what is measured
    "--model", "--set", "--gate", "--against", "--baselines", "--update-baselines", "--force-update", "--journal",
    "--resume", "--report", "--plan", "--ray",
})  # fmt: skip


def settings_of(context: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that a run was given and that measuring more of the same needs, from its record in the journal.

    >>> settings_of({"command": "pytest bench -m quality --base './my model' --seed=1 --model nf4 --resume -q"})
    ('--base', './my model', '--seed=1')
    """
    try:
        words = words_of(context.get("command") or "")
    except ValueError:  # an unfinished quotation: none that this package wrote
        return ()
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name not in OPTIONS:
            continue
        found = [word] if equals or not takes_value(name) else [word, *([value] if (value := next(rest, None)) else [])]
        kept += found if name not in _OF_A_RUN else []
    return tuple(kept)


def settings_in(contents: "Contents | None", row: "Row") -> tuple[str, ...]:
    """Those of the last run of the row's base and device in a journal; none without a journal.

    Of a journal as readers see it (`bench.results.bases.told_apart`) local folders are shortened to …/NAME.
    """
    names = {(row.base, row.base_hash), (label_of(row.base, row.base_hash), row.base_hash)}
    for record in reversed(contents.records if contents else ()):
        if record["kind"] != "run" or contents.bases.of(record) not in names:
            continue
        if record["context"].get("fingerprint") == row.device:
            return settings_of(record["context"])
    return ()


def measuring(markers: Iterable[str], recipes: Iterable[str], base: str, settings: Sequence[str] = ()) -> str:
    """The command that measures these recipes of a base: with the settings of an earlier run, or the base's name."""
    words = ["pytest", "bench", "-m", " or ".join(markers), "--model", ",".join(recipes)]
    named = any(each.partition("=")[0] == "--base" for each in settings)
    return shell([*words, *([] if named or base == "reference" else ["--base", base]), *settings])
