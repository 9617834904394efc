"""Folders sealed by digests: what was sealed is read, what was changed is refused, and any kill can be resumed from."""

import fcntl
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest
from checkpoints import rewrite, says
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.errors import CheckpointError
from compression.files.sealed_folder import Seal, SealedFolder
from compression.files.strict_json import check_signature

SEAL = Seal("seal.json", CheckpointError, again="have it made again")
IDENTITY = {"base": "a1", "seed": 0, "texts": [1, None, "ä"]}
BUSY = "another process has it"

names = st.text("ab/.", min_size=1, max_size=5).filter(
    lambda name: "seal" not in name and all(part.strip(".") for part in name.split("/"))
)
scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
tables = st.dictionaries(st.text(min_size=1, max_size=5), values, max_size=3)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Makes a path at which nothing is."""
    numbers = iter(range(10**6))
    base = tmp_path_factory.mktemp("sealed")
    return lambda: base / str(next(numbers))


def sealed(path, members, identity=IDENTITY, **facts):
    with SealedFolder.claim(path, SEAL, identity, BUSY) as folder:
        for name, content in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            with folder.writing(name) as temporary:
                temporary.write_bytes(content)
        folder.commit(**facts)
    return path


def contents(path):
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


# --- What is read -----------------------------------------------------------------------------------------------------


@given(
    members=st.dictionaries(names, st.binary(max_size=20), max_size=4).filter(
        lambda table: not any(other.startswith(f"{name}/") for name in table for other in table)
        and len({os.path.normpath(name) for name in table}) == len(table)
    ),
    identity=tables, facts=tables,
)  # fmt: skip
def test_what_was_sealed_is_read(fresh, members, identity, facts):
    facts = {f"the {name}": value for name, value in facts.items()}
    path = sealed(fresh(), members, identity, **facts)

    folder = SealedFolder.open(path, SEAL, identity)

    assert members.keys() == folder.files.keys()
    assert {name: (path / name).read_bytes() for name in members} == members
    assert (identity, facts) == (folder.identity, folder.facts)


def test_there_is_none_where_no_seal_is(tmp_path):
    (tmp_path / "member").write_bytes(b"not sealed")

    assert SealedFolder.open(tmp_path, SEAL, IDENTITY) is None
    assert SealedFolder.open(tmp_path / "nowhere", SEAL, IDENTITY) is None


def test_tuples_are_the_lists_that_they_become(tmp_path):
    path = sealed(tmp_path / "folder", {}, {"pair": (1, 2)})

    assert [1, 2] == SealedFolder.open(path, SEAL, {"pair": (1, 2)}).identity["pair"]


# --- What is refused --------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_any_flipped_byte_of_a_member_is_refused(fresh, data):
    members = {"a": b"0123456789", "b/c": b"x"}
    path = sealed(fresh(), members)
    name = data.draw(st.sampled_from(sorted(members)))
    at = data.draw(st.integers(0, len(members[name]) - 1))
    changed = bytearray(members[name])
    changed[at] ^= data.draw(st.integers(1, 255))
    (path / name).write_bytes(changed)

    words = says(f"{path / name} is corrupt: its SHA-256 does not match", f"delete {path} to have it made again")
    with pytest.raises(CheckpointError, match=words):
        SealedFolder.open(path, SEAL, IDENTITY)


@given(data=st.data())
def test_any_flipped_byte_of_the_seal_is_refused_or_changes_nothing(fresh, data):
    path = sealed(fresh(), {"a": b"0123"}, done=3)
    content = bytearray((path / SEAL.file).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (path / SEAL.file).write_bytes(content)

    try:
        found = SealedFolder.open(path, SEAL, IDENTITY)
    except CheckpointError as error:
        assert f"{path / SEAL.file} is damaged" in str(error)
    else:  # one blank became another
        assert (3, {"a"}) == (found.facts["done"], found.files.keys())
        check_signature(json.loads(content))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: (path.unlink(), path.mkdir())])
def test_a_member_that_is_gone_is_refused(tmp_path, damage):
    path = sealed(tmp_path / "folder", {"a": b"0123"})
    damage(path / "a")

    with pytest.raises(CheckpointError, match=says(f"{path / 'a'} is missing", "delete")):
        SealedFolder.open(path, SEAL, IDENTITY)


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        ({**IDENTITY, "seed": 1}, "made with another seed: 0, now 1"),
        ({"base": "a1", "seed": 0}, "made with another texts: [1, None, 'ä'], now None"),
        ({**IDENTITY, "recipe": "nf4"}, "made with another recipe: None, now 'nf4'"),
    ],
)
def test_a_folder_of_other_inputs_is_refused_in_words(tmp_path, identity, words):
    path = sealed(tmp_path / "folder", {"a": b"0123"})
    before = contents(path)

    with pytest.raises(CheckpointError, match=says(words, "delete it to have it made again")):
        SealedFolder.open(path, SEAL, identity)
    with pytest.raises(CheckpointError, match=says(words)), SealedFolder.claim(path, SEAL, identity, BUSY):
        pass
    assert before == contents(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 3}, "schema must be 2, not 3"),
        ({"schema": True}, "schema must be 2, not True"),
        ({"schema": ..., "digest": ...}, "it names no schema"),
        ({"files": ["a"]}, "identity and files must be tables"),
        ({"files": {"../a": "0"}}, "'../a' must be the name of a file in the folder"),
        ({"files": {"/a": "0"}}, "'/a' must be the name of a file in the folder"),
        ({"files": {"": "0"}}, "'' must be the name of a file in the folder"),
        ({"identity": ...}, "KeyError: 'identity'"),
    ],
)
def test_a_seal_that_says_what_cannot_be_is_refused_though_it_is_signed(tmp_path, changes, words):
    path = sealed(tmp_path / "folder", {"a": b"0123"})
    rewrite(path / SEAL.file, **changes)

    with pytest.raises(CheckpointError, match=says("seal.json is damaged", words, "delete")):
        SealedFolder.open(path, SEAL, IDENTITY)


def test_a_member_is_never_written_twice(tmp_path):
    with SealedFolder.claim(tmp_path / "folder", SEAL, IDENTITY, BUSY) as folder:
        with folder.writing("a") as temporary:
            temporary.write_bytes(b"1")
        with pytest.raises(ValueError, match="is sealed already"), folder.writing("a"):
            pass
        with pytest.raises(ValueError, match="files cannot be facts"):
            folder.commit(files={})


def test_a_write_that_fails_leaves_no_member(tmp_path):
    with SealedFolder.claim(tmp_path / "folder", SEAL, IDENTITY, BUSY) as folder:
        with pytest.raises(ZeroDivisionError), folder.writing("a") as temporary:
            temporary.write_bytes(b"1")
            raise ZeroDivisionError
        assert ({}, ["seal.json"]) == (folder.files, [path.name for path in folder.path.iterdir()])


def test_one_process_has_it_at_a_time(tmp_path):
    path = sealed(tmp_path / "folder", {})
    other = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=BUSY), SealedFolder.claim(path, SEAL, IDENTITY, BUSY):
            pass
    finally:
        os.close(other)
    with SealedFolder.claim(path, SEAL, IDENTITY, BUSY) as folder:
        assert folder.files == {}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_made_is_said():
    words = "folder /proc/self/folder cannot be written"
    with pytest.raises(CheckpointError, match=words), SealedFolder.claim(Path("/proc/self/folder"), SEAL, {}, BUSY):
        pass


# --- What is deleted --------------------------------------------------------------------------------------------------


def test_only_what_does_not_count_is_swept(tmp_path):
    path = sealed(tmp_path / "folder", {"inputs-1": b"1", "kept-1/inputs-a": b"2"})
    (path / "inputs-2").write_bytes(b"not sealed")
    (path / "kept-2").mkdir()
    (path / "notes.txt").write_bytes(b"of somebody")
    (path / ".torn.part").write_bytes(b"by a kill")

    with SealedFolder.claim(path, SEAL, IDENTITY, BUSY) as folder:
        folder.sweep("inputs-*")
        folder.sweep("kept-*")
        assert {"seal.json", "inputs-1", "kept-1/inputs-a", "notes.txt"} == contents(path).keys()
        folder.drop(["inputs-1", "never there"])
        folder.commit()
        folder.sweep("inputs-*")

    assert {"seal.json", "kept-1/inputs-a", "notes.txt"} == contents(path).keys()
    assert not (path / "kept-2").exists()


def test_files_that_others_write_are_taken_in(tmp_path):
    with SealedFolder.claim(tmp_path / "folder", SEAL, IDENTITY, BUSY) as folder:
        (folder.path / "deep").mkdir()
        (folder.path / "deep" / "a").write_bytes(b"1")
        folder.adopt(folder.path.rglob("*a"))
        folder.commit()
        folder.adopt(folder.path.rglob("*a"))  # as it was
        (tmp_path / "folder" / "deep" / "a").write_bytes(b"2")
        with pytest.raises(ValueError, match="was sealed already, and was written again since"):
            folder.adopt(folder.path.rglob("*a"))

    with pytest.raises(CheckpointError, match="deep/a is corrupt"):
        SealedFolder.open(tmp_path / "folder", SEAL, IDENTITY)


# --- Kills ------------------------------------------------------------------------------------------------------------

EVENTS = ("open", "os.", "fcntl.", "shutil.", "tempfile.", "test.")  # audit events: of files, and in the middle of one


def killed(number, work, *arguments):
    """Whether a process that does the work is killed (kill -9) before its touch of the disk of this number."""
    child = os.fork()
    if child == 0:
        touches = 0

        def hook(event, arguments):
            nonlocal touches
            touches += event.startswith(EVENTS)
            if touches == number:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert signal.SIGKILL == os.WTERMSIG(status)
        return True
    assert 0 == os.WEXITSTATUS(status), "the child failed"
    return False


def write(folder, name):
    with folder.writing(name) as temporary, open(temporary, "wb", buffering=0) as file:
        file.write(name.encode())
        sys.audit("test.half")
        file.write(name.encode())


def block_by_block(path):
    """As models are written: each block with what reaches the next one, which the block after it makes useless."""
    with SealedFolder.claim(path, SEAL, IDENTITY, BUSY) as folder:
        folder.sweep("inputs-*")
        for done in range(folder.facts.get("done", 0), 3):
            write(folder, f"block-{done}")
            write(folder, f"inputs-{done + 1}")
            folder.drop([f"inputs-{done}"])
            folder.commit(done=done + 1)
            folder.sweep("inputs-*")


def checkpoint_by_checkpoint(path):
    """As training goes: folders that another library writes, of which the last one counts."""
    with SealedFolder.claim(path, SEAL, IDENTITY, BUSY) as folder:
        folder.sweep("checkpoint-*")
        for done in range(folder.facts.get("done", 0), 3):
            place = path / f"checkpoint-{done}"
            place.mkdir()
            for name in ("weights", "state"):
                (place / name).write_bytes(f"{name} {done}".encode())
            folder.adopt(place.iterdir())
            folder.drop(name for name in folder.files if not name.startswith(place.name))
            folder.commit(done=done + 1)
            folder.sweep("checkpoint-*")


def at_once(path):
    """As results are kept: whole, or not at all."""
    if not (path / SEAL.file).exists():
        with SealedFolder.whole(path, SEAL, IDENTITY) as folder:
            (folder.path / "deep").mkdir()
            (folder.path / "deep" / "a").write_bytes(b"1")
            (folder.path / "b").write_bytes(b"2")


WORK = [block_by_block, checkpoint_by_checkpoint, at_once]


@pytest.mark.process
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_a_run_that_is_killed_before_any_touch_of_the_disk_ends_as_if_nothing_had_been(tmp_path, work):
    work(tmp_path / "undisturbed")
    whole, number, half_done = contents(tmp_path / "undisturbed"), 1, 0

    while killed(number, work, tmp_path / f"killed at {number}"):
        path = tmp_path / f"killed at {number}"
        found = SealedFolder.open(path, SEAL, IDENTITY)  # nothing that counts is missing, torn or old
        half_done += found is not None and found.facts.get("done", 0) in (1, 2)
        assert found is not None or work is not at_once or not path.exists()
        work(path)
        assert whole == contents(path)
        shutil.rmtree(path)
        number += 1

    assert number > 10
    assert half_done > 10 or work is at_once


@pytest.mark.process
@settings(max_examples=20)
@given(numbers=st.lists(st.integers(1, 40), min_size=2, max_size=4))
@pytest.mark.parametrize("work", [block_by_block, checkpoint_by_checkpoint], ids=lambda work: work.__name__)
def test_so_does_one_that_is_killed_again_and_again(fresh, work, numbers):
    path, undisturbed, done = fresh(), fresh(), 0
    for number in numbers:
        killed(number, work, path)
        found = SealedFolder.open(path, SEAL, IDENTITY)
        assert done <= (done := 0 if found is None else found.facts.get("done", 0))
    work(path)
    work(undisturbed)

    assert contents(undisturbed) == contents(path)


@pytest.mark.process
def test_a_kill_that_is_not_resumed_from_would_be_seen(tmp_path):
    """Negative control: a seal that comes before its member promises what is not there."""

    def seal_first(path):
        with SealedFolder.claim(path, SEAL, IDENTITY, BUSY) as folder:
            folder.files["a"] = "0"
            folder.commit()
            sys.audit("test.between")
            (path / "a").write_bytes(b"1")

    outcomes = set()
    number = 1
    while killed(number, seal_first, tmp_path / str(number)):
        try:
            SealedFolder.open(tmp_path / str(number), SEAL, IDENTITY)
            outcomes.add("opened")
        except CheckpointError as error:
            outcomes.add("missing" if "is missing" in str(error) else "other")
        number += 1

    assert {"opened", "missing"} == outcomes


@pytest.mark.process
def test_the_claim_of_a_killed_process_is_free(tmp_path):
    def hold():
        with SealedFolder.claim(tmp_path / "folder", SEAL, IDENTITY, BUSY):
            sys.audit("test.held")
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(-1, hold)
    with SealedFolder.claim(tmp_path / "folder", SEAL, IDENTITY, BUSY):
        pass
