"""The life of a baseline: created, compared in words, recorded after review, merged, pruned, migrated, refused."""

import json
from dataclasses import replace

import pytest
from checkpoints import says
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import completed

from bench.commands.baselines import main, pruned
from bench.errors import BaselineError
from bench.gate.baseline import ANYWHERE, Baseline, fallback
from bench.gate.digest import sign
from bench.gate.migrations import old_hash, params_of, with_base
from bench.gate.recording import update
from bench.gate.verdicts import judge
from bench.machine.git import changed, commit
from bench.metrics import all_metrics
from bench.results.bases import OLD
from bench.results.items import Items, hashes_of
from bench.results.journal import Journal
from bench.results.row import Row, key_of
from compression import locate

HERE, THERE = "cpu-here-avx2-1t", "cuda-there-16gib"
CONTEXT = {"base_hash": "b1", "data_hash": {}, "seed": 0, "torch": "2.13.0", "commit": "abcdef123456"}


def row(metric, value, *, base_value=None, recipe="nf4", device=HERE, run="r1", **facts):
    known = all_metrics()[metric]
    ratio = value / base_value if base_value else None
    own = {"base": "reference", "unit": known.unit, "better": known.better, "of": known.of, "seed": 0}
    return Row(
        run=run, recipe=recipe, device=device, metric=metric, value=value, base_value=base_value,
        ratio=ratio, **own | facts,
    )  # fmt: skip


def size(value, **facts):
    return row("efficiency.stored_bytes", value, **facts)


def speed(value, **facts):
    return row("efficiency.decode_ms", value, base_value=4.0, params={"batch": 1}, **facts)


def record(folder, *rows, device=HERE, **context):
    return update(folder, rows, CONTEXT | context, device)


def journal(path, *rows, ending="passed", **context):
    with Journal(path) as lines:
        lines.start(CONTEXT | context)
        for each in rows:
            lines.append(replace(each, run=lines.run))
        if ending:
            lines.end(ending)
    return path


def asked(folder, command, *arguments):
    main([command, *map(str, arguments), "--baselines", str(folder)])


def git(folder, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    done = completed(["git", *names, *arguments], cwd=folder, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of somebody's, with one commit, as the working folder."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "method.py").write_text("a = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "a method")
    monkeypatch.chdir(folder)
    return folder


# --- Compared, in words ----------------------------------------------------------------------------------------------


def test_the_difference_to_a_commit_says_which_rows_moved_by_how_much_and_in_which_direction(repository, capsys):
    folder = repository / "baselines"
    record(folder, size(100.0), speed(2.0), row("quality.perplexity", 13.0))
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "baselines")
    record(folder, size(90.0), speed(3.0), row("quality.accuracy", 0.5))

    asked(folder, "diff")

    assert capsys.readouterr().out.splitlines() == [
        "nf4: 1 worse, 1 better, 1 new, 1 as before",
        "",
        "nf4: efficiency.decode_ms[batch=1] worse: 2 -> 3 ms/token (+50 %), ratio to fp16 0.5 -> 0.75 (+50 %)",
        "nf4: efficiency.stored_bytes better: 100 -> 90 B (-10 %)",
        "nf4: quality.accuracy new: 0.5 share",
    ]


def test_two_folders_are_compared_and_what_moved_within_its_tolerance_comes_last(tmp_path, capsys):
    record(tmp_path / "a", size(100.0), speed(2.0), size(7.0, recipe="fp16"))
    record(tmp_path / "b", size(101.0), speed(2.02))

    asked(tmp_path / "b", "diff", tmp_path / "a", tmp_path / "b")

    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["fp16: 1 dropped, 0 as before", "nf4: 1 worse, 1 within tolerance, 0 as before"]
    assert said[-2].startswith("nf4: efficiency.stored_bytes worse: 100 -> 101 B")
    assert said[-1].endswith("(+1 %), within its tolerance")


def test_equal_baselines_differ_in_no_row_and_an_unknown_commit_is_refused_by_name(repository, capsys):
    folder = repository / "baselines"
    record(folder, size(100.0))

    asked(folder, "diff", folder)
    assert "no row differs in 1 baselines" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        asked(folder, "diff", "nonsense")
    assert "at 'nonsense' cannot be read" in capsys.readouterr().err


# --- Recorded after review -------------------------------------------------------------------------------------------


def test_a_run_of_the_journal_is_recorded_once_its_difference_was_read(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "baselines"
    record(folder, size(100.0))
    path = journal(tmp_path / "journal.jsonl", size(90.0))

    with pytest.raises(SystemExit) as end:  # nobody to ask
        asked(folder, "update", "--journal", path)
    assert (1, 100.0) == (
        end.value.code,
        Baseline.find(folder, "reference", "nf4").sections[ANYWHERE].rows["efficiency.stored_bytes"].value,
    )
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "y")
    asked(folder, "update", "--journal", path)

    assert "nf4: efficiency.stored_bytes better: 100 -> 90 B (-10 %)" in capsys.readouterr().out
    entry = Baseline.find(folder, "reference", "nf4").sections[ANYWHERE].rows["efficiency.stored_bytes"]
    assert 90.0 == entry.value


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"ending": "failed"}, "it failed, and a failed run is not a baseline"),
        ({"ending": "interrupted"}, "it interrupted, and a failed run is not a baseline"),
        ({"ending": None}, "it did not end, and a failed run is not a baseline"),
        ({"commit": "abcdef123456+"}, "tracked files differed from commit abcdef123456"),
    ],
    ids=["failed", "interrupted", "killed", "changed files"],
)
def test_a_run_that_should_be_no_baseline_is_recorded_only_by_force_and_the_file_says_so(
    tmp_path, capsys, facts, words
):
    folder = tmp_path / "baselines"
    broken = row("efficiency.decode_ms", None, status="failed", reason="it broke", params={"batch": 1})
    path = journal(tmp_path / "journal.jsonl", size(90.0), broken, **facts)

    with pytest.raises(SystemExit) as end:
        asked(folder, "update", "--journal", path, "--yes")
    assert 2 == end.value.code
    assert words in capsys.readouterr().err
    assert not folder.exists()

    asked(folder, "update", "--journal", path, "--yes", "--force-update")
    assert "nf4: efficiency.decode_ms[batch=1] not recorded: failed: it broke" in capsys.readouterr().out
    section = Baseline.find(folder, "reference", "nf4").sections[ANYWHERE]
    assert (["efficiency.stored_bytes"], True) == (list(section.rows), section.context["forced"])


def test_data_that_a_run_read_after_it_started_is_known_from_its_journal(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as lines:
        lines.start(CONTEXT)
        lines.start(CONTEXT | {"data_hash": {"perplexity": "d1"}})
        lines.append(replace(row("quality.perplexity", 13.0), run=lines.run))
        lines.end("passed")

    asked(tmp_path / "baselines", "update", "--journal", tmp_path / "journal.jsonl", "--yes")

    found = Baseline.find(tmp_path / "baselines", "reference", "nf4").sections[ANYWHERE]
    assert "d1" == found.rows["quality.perplexity"].context["data_hash"]


# --- A tree with changed files ---------------------------------------------------------------------------------------


def test_changed_files_are_seen_but_those_of_the_baselines_and_untracked_ones(repository):
    folder = repository / "baselines"
    record(folder, size(100.0))
    (repository / "notes.txt").write_text("x")
    git(repository, "add", "baselines")
    git(repository, "commit", "-qm", "baselines")
    record(folder, size(90.0))

    assert ([], ["baselines/reference/nf4.json"]) == (changed(folder), changed())
    assert git(repository, "rev-parse", "--short=12", "HEAD") == commit(folder) == commit().removesuffix("+")
    (repository / "method.py").write_text("a = 2\n")
    assert (["method.py"], "+") == (changed(folder), commit(folder)[-1])


def test_outside_of_a_repository_nothing_is_changed_and_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ([], None) == (changed(), commit())
    git(tmp_path, "init", "-q")
    assert ([], None) == (changed(), commit())
    monkeypatch.setenv("PATH", "")
    assert ([], None) == (changed(), commit())


def test_a_repository_of_which_git_cannot_tell_is_no_clean_one(repository):
    (repository / ".git" / "config").write_text("[core\n")

    with pytest.raises(BaselineError, match="git cannot tell which files have changed"):
        changed()


# --- Several devices -------------------------------------------------------------------------------------------------


def test_baselines_of_two_machines_are_merged_side_by_side(tmp_path, capsys):
    record(tmp_path / "ours", size(100.0), speed(2.0))
    record(tmp_path / "theirs", size(100.0, device=THERE), speed(0.5, device=THERE), device=THERE)

    asked(tmp_path / "ours", "merge", tmp_path / "theirs", "--yes")

    baseline = Baseline.find(tmp_path / "ours", "reference", "nf4")
    assert [HERE, THERE] == baseline.devices
    values = {place: [each.value for each in section.rows.values()] for place, section in baseline.sections.items()}
    assert {ANYWHERE: [100.0], HERE: [2.0], THERE: [0.5]} == values
    assert f"nf4: efficiency.decode_ms[batch=1] on {THERE} new: 0.5 ms/token" in capsys.readouterr().out


def test_merging_baselines_of_another_checkpoint_drops_what_cannot_be_compared_with_them(tmp_path, capsys):
    record(tmp_path / "ours", size(100.0), speed(2.0))
    record(tmp_path / "theirs", size(90.0), base_hash="b2")

    asked(tmp_path / "ours", "merge", tmp_path / "theirs", "--yes")

    assert "nf4: 2 recorded rows dropped: base_hash was 'b1', is 'b2'" in capsys.readouterr().out
    assert {ANYWHERE} == set(Baseline.find(tmp_path / "ours", "reference", "nf4").sections)


def test_on_a_device_without_rows_it_is_said_what_is_compared_and_what_is_not(tmp_path):
    record(tmp_path, size(100.0), row("quality.perplexity", 13.0), speed(2.0))
    baseline = Baseline.find(tmp_path, "reference", "nf4")

    assert None is fallback(baseline, HERE)
    other = fallback(baseline, THERE)
    assert f"recorded on {HERE}, not on {THERE}: 1 rows of time and memory are not compared; 2 others" in other
    assert "OMP_NUM_THREADS" not in other
    assert fallback(baseline, "cpu-here-avx2-4t").endswith(
        "only the number of threads differs: set OMP_NUM_THREADS=1 to compare them too"
    )


# --- Pruned ----------------------------------------------------------------------------------------------------------


def answers(count):
    items = Items(hashes_of(range(count)), [1.0] * count, "binary")
    return row("quality.accuracy", 1.0, params={"n": count}, items=items)


def test_pruning_removes_what_no_run_can_be_compared_with_and_nothing_else(tmp_path, capsys):
    record(tmp_path, size(100.0), answers(3))
    record(tmp_path, speed(0.5, device=THERE), device=THERE)
    record(tmp_path, size(50.0, recipe="fp16"))
    kept = (tmp_path / "reference" / "fp16.json").read_bytes()
    items = tmp_path / "reference" / "items"
    gone = json.loads((tmp_path / "reference" / "nf4.json").read_text()) | {"recipe": "nf5"}
    gone["rows"] = {key: each for key, each in gone["rows"].items() if "items" not in each}
    (tmp_path / "reference" / "nf5.json").write_text(json.dumps(gone))
    sign(tmp_path / "reference" / "nf5.json")
    (items / "0123456789abcdef.hashes").write_bytes(b"")
    (items / "nf6.json").write_text("{}")
    (tmp_path / "reference" / ".nf4.json.17.tmp").write_text("{")

    asked(tmp_path, "prune", "--device", THERE, "--yes")

    said = capsys.readouterr().out
    assert "nf5: efficiency.stored_bytes dropped: unknown recipe: " in said
    assert f"nf4: efficiency.decode_ms[batch=1] dropped: the device {THERE} is removed" in said
    left = sorted(str(path.relative_to(tmp_path / "reference")) for path in tmp_path.rglob("*") if path.is_file())
    own = Baseline.load(tmp_path / "reference" / "nf4.json").items_file(tmp_path)
    assert sorted(["fp16.json", f"items/{answers(3).items.asked}.hashes", f"items/{own.name}", "nf4.json"]) == left
    assert kept == (tmp_path / "reference" / "fp16.json").read_bytes()
    assert {ANYWHERE} == set(Baseline.find(tmp_path, "reference", "nf4").sections)


def test_rows_of_a_metric_that_is_gone_are_pruned(tmp_path, monkeypatch):
    from bench.metrics.registry import METRICS

    record(tmp_path, size(100.0), row("efficiency.parameters", 8.0))
    monkeypatch.delitem(METRICS, "efficiency.parameters")

    proposal = pruned(Baseline.find(tmp_path, "reference", "nf4"))

    assert ["nf4: efficiency.parameters dropped: no metric efficiency.parameters is declared"] == proposal.words
    assert ["efficiency.stored_bytes"] == list(proposal.new.sections[ANYWHERE].rows)


def test_healthy_baselines_are_left_alone_by_prune_and_migrate(tmp_path, capsys):
    record(tmp_path, size(100.0), answers(3), speed(2.0))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    asked(tmp_path, "prune")
    asked(tmp_path, "migrate")

    assert "nothing to write\nnothing to write\n" == capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# --- Migrated --------------------------------------------------------------------------------------------------------

PLAIN_NUMBERS = """
{
  "schema": 0,
  "base": "reference",
  "recipe": "nf4",
  "context": {"base_hash": "B1", "seed": 0, "torch": "2.13.0", "fingerprint": "cpu-here-avx2-1t", "commit": "abc"},
  "rows": {
    "efficiency.stored_bytes": 3491872,
    "efficiency.decode_ms[batch=1,mode=eager,new_tokens=128]": 2.316,
    "quality.perplexity[data=embedded,length=512]": 2.545
  }
}
""".replace("B1", old_hash(locate("reference")))


def test_a_baseline_of_an_older_schema_is_read_as_todays_and_migrated_without_losing_a_row(tmp_path, capsys):
    path = tmp_path / "reference" / "nf4.json"
    path.parent.mkdir()
    path.write_text(PLAIN_NUMBERS)
    read = Baseline.load(path)

    asked(tmp_path, "migrate", "--yes")

    assert 2 == json.loads(path.read_text())["schema"]
    assert with_base(read, {locate("reference"): old_hash(locate("reference"))}) == Baseline.load(path)
    assert (f"{OLD}{old_hash(locate('reference'))}", locate("reference").digest) == (
        read.base_hash, Baseline.load(path).base_hash
    )  # fmt: skip
    entry = read.sections[HERE].rows["efficiency.decode_ms[batch=1,mode=eager,new_tokens=128]"]
    assert (2.316, "timing", "ms/token", "lower") == (entry.value, entry.kind, entry.unit, entry.better)
    assert {"batch": 1, "mode": "eager", "new_tokens": 128} == entry.params
    assert "cpu-here-avx2-1t" == entry.context["fingerprint"]
    assert 2 == len(read.sections[ANYWHERE].rows)
    assert "nf4: written in schema 2, its base verified" in capsys.readouterr().out


def of_schema_1(folder, base_hash):
    """Recorded rows with items, as schema 1 had them: a folder's base under its name alone."""
    scores = Items(hashes_of(range(4)), (1, 0, 1, 1), "binary")
    own = {"params": {"decoding": "greedy"}, "items": scores, "base": "tiny"}
    record(folder, row("rag.exact_match", scores.mean, **own), size(100.0, base="tiny"), base_hash=base_hash)
    [path] = folder.glob("tiny-*/nf4.json")
    path.parent.rename(folder / "tiny")
    path = folder / "tiny" / "nf4.json"
    table = json.loads(path.read_text()) | {"schema": 1}
    (path.parent / "items" / f"nf4.{table.pop('items')}.json").rename(path.parent / "items" / "nf4.json")
    path.write_text(json.dumps(table))
    sign(path)
    return path


def test_a_baseline_of_schema_1_is_migrated_if_the_base_at_hand_is_the_one_that_was_recorded(tmp_path, folder, capsys):
    baselines = tmp_path / "baselines"
    path = of_schema_1(baselines, old_hash(locate(str(folder))))
    assert ("tiny", f"{OLD}{old_hash(locate(str(folder)))}") == Baseline.load(path).identity

    for more, words in (([], "give its path with --checkpoint"), (["--checkpoint", tmp_path], "give its path")):
        with pytest.raises(SystemExit):
            asked(baselines, "migrate", "--yes", *more)
        assert words in capsys.readouterr().err
    asked(baselines, "migrate", "--yes", "--checkpoint", folder)

    digest = locate(str(folder)).digest
    kept = Baseline.find(baselines, "tiny", "nf4", digest)
    assert {kept.items_file(baselines), baselines / f"tiny-{digest[:8]}" / "nf4.json"} == set(baselines.rglob("*.json"))
    assert ("tiny", digest) == kept.identity and 2 == len(kept.sections[ANYWHERE].rows)
    asked(baselines, "migrate", "--yes")
    assert "nothing to write\n" == capsys.readouterr().out.rpartition("written to")[2].partition("\n")[2]


def test_a_baseline_of_schema_1_is_not_migrated_to_another_base_and_not_compared(tmp_path, folder, capsys):
    path = of_schema_1(tmp_path / "baselines", "b" * 64)
    before = path.read_bytes()

    with pytest.raises(SystemExit):
        asked(tmp_path / "baselines", "migrate", "--yes", "--checkpoint", folder)

    assert "recorded for a base of hash bbbbbbbbbbbb" in capsys.readouterr().err
    assert before == path.read_bytes()
    found = Baseline.find(tmp_path / "baselines", "tiny", "nf4", locate(str(folder)).digest)
    context = CONTEXT | {"base_hash": locate(str(folder)).digest}
    verdict = judge(size(100.0, base="tiny"), found, mode="auto", fingerprint=HERE, context=context)
    assert ("not_comparable", True) == (verdict.outcome, verdict.fails) and "baselines migrate` checks" in verdict.words


def test_nothing_is_recorded_over_a_baseline_of_schema_1_of_a_name(tmp_path):
    path = tmp_path / "reference" / "nf4.json"
    path.parent.mkdir()
    path.write_text(PLAIN_NUMBERS)

    with pytest.raises(BaselineError, match="baselines migrate"):
        record(tmp_path, size(100.0))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"schema": 0', '"schema": 3', ("schema=3 must be from 0 to 2", "upgrade this one")),
        ('"schema": 0', '"schema": true', ("schema=True must be from 0 to 2",)),
        ('"schema": 0', '"schema": -1', ("schema=-1 must be from 0 to 2",)),
        ('"schema": 0', '"schema": 1', ("lacks devices",)),
        ("stored_bytes", "shoe_size", ("no metric 'efficiency.shoe_size' exists",)),
        ('"fingerprint": "cpu-here-avx2-1t", ', "", ("has no fingerprint",)),
        ("2.545", '"2.545"', ("quality.perplexity", "not '2.545' (str)")),
        ('"rows": {', '"rows": {}, "more": {', ("unknown more",)),
    ],
)
def test_what_cannot_be_migrated_is_refused_by_file_and_row(tmp_path, old, new, words):
    path = tmp_path / "nf4.json"
    path.write_text(PLAIN_NUMBERS.replace(old, new, 1))

    with pytest.raises(BaselineError, match=says(str(path), *words)):
        Baseline.load(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True),
        st.text(max_size=6) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans(),
        max_size=4,
    )
)
def test_parameters_are_found_again_in_every_key(params):
    assert key_of("a.b", params) == key_of("a.b", params_of(key_of("a.b", params)))


def test_what_is_recorded_is_listed(tmp_path, capsys):
    record(tmp_path, size(100.0), speed(2.0))

    asked(tmp_path, "list")

    assert ["reference nf4: 1 rows that no device changes", f"    1 on {HERE}, last of abcdef123456"] == (
        capsys.readouterr().out.splitlines()
    )
