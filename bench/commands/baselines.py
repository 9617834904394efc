"""`python -m bench baselines`: list, compare and update baselines. Every change is shown before it is written.

    list                     what is recorded: recipes, rows, devices
    diff [OLD [NEW]]         which rows moved, by how much, in which direction; OLD is HEAD, NEW the folder of baselines
    update                   record a run of the journal
    merge OTHER              take over the baselines of another folder, as of another machine
    prune                    remove what no run can be compared with: rows and files of recipes, metrics and lists gone
    migrate                  write files of older schemas in today's, each verified against the base that it is of

OLD, NEW and OTHER are folders, or commits of the repository that the folder of baselines is in.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.commands.arguments import journal_option
from bench.errors import BaselineError, BenchError
from bench.gate import tolerances
from bench.gate.baseline import ANYWHERE, ITEMS, Baseline
from bench.gate.entry import Entry
from bench.gate.migrations import SCHEMA, old_hash, with_base
from bench.gate.recording import Proposal, compared, merged, recorded, without, write
from bench.machine import git as repository
from bench.metrics import all_metrics
from bench.results.bases import short
from bench.results.runs import Run, last_run
from compression import CompressionError, Recipe, locate, split_recipes
from compression.checkpoints.base import BaseSource, is_name
from compression.files.strict_json import path_option, strict_json
from compression.files.terminal import printable

Key = tuple[str, str]  # folder and recipe: a name is one base at a time, a folder's name may be that of several


def main(arguments: Sequence[str] | None = None) -> None:
    """List, compare, record, merge, prune and migrate baselines: `python -m bench baselines`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench baselines",
        description=__doc__.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--baselines", type=path_option, default=Path("baselines"), metavar="DIR")
    common.add_argument("--base", help="baselines of this base only")
    common.add_argument("--model", metavar="RECIPES", help="these recipes only, separated by commas")
    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument("--yes", action="store_true", help="write without confirmation")
    commands.add_parser("list", parents=[common])
    diff = commands.add_parser("diff", parents=[common])
    diff.add_argument("old", nargs="?", default="HEAD", metavar="OLD")
    diff.add_argument("new", nargs="?", metavar="NEW")
    updating = commands.add_parser("update", parents=[common, writing])
    journal_option(updating)
    updating.add_argument("--run", help="id of the run; default the last one")
    updating.add_argument(
        "--force-update", action="store_true", help="also from a failed run, or with uncommitted changes"
    )
    commands.add_parser("merge", parents=[common, writing]).add_argument("other", metavar="OTHER")
    pruning = commands.add_parser("prune", parents=[common, writing])
    pruning.add_argument(
        "--device", action="append", default=[], metavar="FINGERPRINT", help="rows of this device as well"
    )
    migrating = commands.add_parser("migrate", parents=[common, writing])
    migrating.add_argument("--checkpoint", action="append", default=[], type=path_option, metavar="DIR",
                           help="folder of a base that is recorded under its last part; may be repeated")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        _COMMANDS[options.command](options)
    except (BenchError, CompressionError) as error:
        parser.error(str(error))


def found(directory: Path, options: argparse.Namespace | None = None) -> dict[Key, Baseline]:
    """The baselines of a folder by base and recipe. Raises BaselineError for one that is damaged or misplaced."""
    if not directory.is_dir():
        raise BaselineError(f"the folder {directory} does not exist; give another with --baselines DIR")
    baselines = {}
    for path in sorted(directory.glob("*/*.json")):
        each = Baseline.load(path)
        if path != each.file(directory):
            raise BaselineError(
                f"baseline {path} is of {each.recipe!r} on {each.base!r}, whose file is "
                f"{each.file(directory)}; remove it, or give it back its name"
            )
        baselines[path.parent.name, each.recipe] = each
    return _chosen(baselines, options) if options else baselines


def _chosen(baselines: Mapping[Key, Baseline], options: argparse.Namespace) -> dict[Key, Baseline]:
    recipes = None if options.model is None else {Recipe.parse(text).text for text in split_recipes(options.model)}
    return {
        (place, recipe): each
        for (place, recipe), each in baselines.items()
        if options.base in (None, each.base, place) and (recipes is None or recipe in recipes)
    }


def _at(place: str, options: argparse.Namespace) -> dict[Key, Baseline]:
    """The baselines of a folder, or of the folder of baselines at a commit."""
    if Path(place).is_dir():
        return found(Path(place), options)
    with tempfile.TemporaryDirectory() as folder:
        repository.export(place, options.baselines, folder)
        return found(Path(folder), options)


def _list(options: argparse.Namespace) -> None:
    for (place, recipe), each in found(options.baselines, options).items():
        shared = each.sections.get(ANYWHERE)
        base = each.base if is_name(each.base) else place
        print(printable(f"{base} {recipe}: {len(shared.rows) if shared else 0} rows that no device changes"))
        for place, section in each.sections.items():
            if place != ANYWHERE:
                print(f"    {len(section.rows)} on {place}, last of {section.context.get('commit') or 'no commit'}")
    for device in tolerances.read(options.baselines):
        print(tolerances.words(options.baselines, device))


def _diff(options: argparse.Namespace) -> None:
    old = _at(options.old, options)
    new = _at(options.new, options) if options.new else found(options.baselines, options)
    proposals = [
        Proposal(old=old.get(key), new=new.get(key), changes=tuple(compared(old.get(key), new.get(key))))
        for key in sorted({*old, *new})
    ]
    if not _say(proposals):
        print(f"no row differs in {len(proposals)} baselines")


def _update(options: argparse.Namespace) -> None:
    run = last_run(options.journal, options.run)
    if (why := refusal(run)) and not options.force_update:
        raise BaselineError(f"run {run.name}: {why}; --force-update records it anyway")
    recipes = options.model and {Recipe.parse(text).text for text in split_recipes(options.model)}
    rows = [row for row in run.rows if options.base in (None, row.base) and (not recipes or row.recipe in recipes)]
    if not rows:
        raise BaselineError(
            f"run {run.name} has no such rows; its recipes are {_names(row.recipe for row in run.rows)}"
        )
    proposals = recorded(options.baselines, rows, run.context, rows[0].device, force=options.force_update)
    when = datetime.fromtimestamp(run.time, UTC).strftime("%Y-%m-%d %H:%M")
    print(f"run {run.name} of {when} UTC, commit {run.context.get('commit') or 'none'}, on {rows[0].device}")
    _review(proposals, options)


def refusal(run: Run) -> str | None:
    """Why a run should not be a baseline, in words; None where nothing speaks against it."""
    if run.ending != "passed":
        said = "".join(f"\n  {words}" for words in run.failing[:8])
        return f"it {run.ending or 'did not end'}, and a failed run is not a baseline{said}"
    if run.unclean:
        return f"tracked files differed from commit {run.commit}, so no commit reproduces these numbers"
    return None


def _merge(options: argparse.Namespace) -> None:
    _review([merged(options.baselines, each) for each in _at(options.other, options).values()], options)


def _prune(options: argparse.Namespace) -> None:
    baselines = found(options.baselines, options)
    known = {device for each in baselines.values() for device in each.devices}
    if unknown := set(options.device) - known:
        raise BaselineError(f"no baseline has rows of {_names(unknown)}; there are {_names(known)}")
    proposals = [pruned(each, options.device) for each in baselines.values()]
    there = found(options.baselines)
    kept = {**there, **dict(zip(baselines, (each.new for each in proposals), strict=True))}
    _review([each for each in proposals if each.changes], options, unused(options.baselines, kept))


def pruned(old: Baseline, devices: Iterable[str] = ()) -> Proposal:
    """The baseline without rows that no run can have again, and without those of `devices`; None of a recipe gone."""
    try:
        text = Recipe.parse(old.recipe).text
        gone = None if text == old.recipe else f"the recipe is now written {text}"
    except CompressionError as error:
        gone = f"unknown recipe: {error}"
    metrics = all_metrics()

    def reason(at: tuple[str, str], entry: Entry) -> str | None:
        if at[0] in devices:
            return f"the device {at[0]} is removed"
        return gone or (None if entry.metric in metrics else f"no metric {entry.metric} is declared")

    kept, dropped = without(old, reason)
    return Proposal(old=old, new=kept if kept.sections else None, changes=tuple(dropped))


def unused(directory: Path, kept: Mapping[Key, Baseline | None]) -> list[Path]:
    """Files that no kept baseline names: items of others, lists of items, and what a killed writer left."""
    left = [each for each in kept.values() if each is not None]
    files = {each.items_file(directory) for each in left}
    lists = {
        each.file(directory).parent / ITEMS / f"{entry.items.asked}.hashes"
        for each in left
        for section in each.sections.values()
        for entry in section.rows.values()
        if entry.items
    }
    gone = [path for path in directory.glob(f"*/{ITEMS}/*.json") if path not in files]
    gone += [path for path in directory.glob(f"*/{ITEMS}/*.hashes") if path not in lists]
    gone += [path for pattern in ("*/.*.tmp", f"*/{ITEMS}/.*.tmp") for path in directory.glob(pattern)]
    return sorted(gone)


def _migrate(options: argparse.Namespace) -> None:
    """Files of older schemas in today's: the base of each is opened, and must be the one that was recorded."""
    hashes: dict[BaseSource, str] = {}
    proposals = []
    for old in found(options.baselines, options).values():
        if strict_json(old.file(options.baselines).read_text())["schema"] == SCHEMA:
            continue
        new, note = old, f"{old.recipe}: written in schema {SCHEMA}"
        if old.base_hash is not None:
            for source in _sources(old.base, options.checkpoint):
                hashes.setdefault(source, old_hash(source))
            new = with_base(old, hashes)
            note += f", its base verified: base_hash {short(old.base_hash)} is {short(new.base_hash)} now"
        proposals.append(Proposal(old=old, new=new, changes=(), notes=(note,)))
    _review(proposals, options)


def _sources(label: str, checkpoints: Sequence[Path]) -> list[BaseSource]:
    """What a label may be of: a name opens itself, folders have to be given. Raises BaselineError where none is."""
    if is_name(label):
        return [locate(label).fetch()]
    if fitting := [each for each in map(locate, map(str, checkpoints)) if each.label == label]:
        return fitting
    raise BaselineError(f"the baselines of {label} belong to a folder; give its path with --checkpoint .../{label}")


def _review(proposals: Sequence[Proposal], options: argparse.Namespace, files: Sequence[Path] = ()) -> None:
    """Say what would be written, and write it if that is wanted. Exits with 1 where it is not."""
    if not (proposals or files) or not (_say(proposals) or files):
        print("nothing to write")
        return
    for path in files:
        print(f"{path}: removed: no baseline refers to it")
    if not options.yes:
        if not sys.stdin.isatty():
            print("nothing was written; --yes writes it", file=sys.stderr)
            raise SystemExit(1)
        if input(f"write this to {options.baselines}? [y/N] ").strip().lower() not in ("y", "yes"):
            raise SystemExit("nothing was written")
    write(options.baselines, proposals)
    for path in files:
        path.unlink(missing_ok=True)
    print(f"written to {options.baselines}")


def _say(proposals: Sequence[Proposal]) -> bool:
    """Print summaries, then every change; whether there was any."""
    moving = [each for each in proposals if each.words]
    for each in moving:
        print(printable(each.summary))
    for each in moving:
        print("\n".join(["", *map(printable, each.words)]))
    return bool(moving)


def _names(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts)) or "none"


_COMMANDS = {
    "list": _list,
    "diff": _diff,
    "update": _update,
    "merge": _merge,
    "prune": _prune,
    "migrate": _migrate,
}
