"""Results per item: packed, kept beside baselines, and refused where they are not what was recorded."""

import hashlib
import json
import math
import struct
import sys
from dataclasses import replace

import pytest
from checkpoints import says
from healthy_results import HEALTHY_METRICS, healthy_row, items, recorded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import completed

from bench.errors import BaselineError, MetricError
from bench.gate.verdicts import Baseline, update
from bench.results import items as stored
from bench.results.items import Items, hashes_of

A, B, C = hashes_of(["a", "b", "c"])
keys = st.text("abc[=]%", min_size=1, max_size=6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(keys, items(), max_size=4))
def test_items_come_back_from_their_files_equal(tmp_path, rows):
    stored.save(tmp_path, "nf4", rows)

    assert rows == stored.load(tmp_path, "nf4")


@given(items())
def test_items_come_back_from_the_journal_equal(each):
    assert each == Items.from_json(json.loads(json.dumps(each.to_json())))


@given(items(), st.randoms())
def test_the_order_in_which_items_are_given_changes_nothing(each, order):
    pairs = list(zip(each.hashes, each.values, strict=True))
    order.shuffle(pairs)

    again = Items([name for name, _ in pairs], [value for _, value in pairs], each.kind)

    assert (each, each.digest) == (again, again.digest)


@given(items(), st.data())
def test_any_other_value_has_another_digest(each, data):
    place = data.draw(st.integers(0, len(each) - 1))
    values = list(each.values)
    values[place] = 1 - values[place] if each.kind == "binary" else values[place] + 1

    other = Items(each.hashes, values, each.kind)

    assert each.asked == other.asked
    assert (each.values == other.values) == (each.digest == other.digest)


def test_the_hash_is_that_of_all_that_is_asked_and_repeats_are_counted():
    once, again, other = hashes_of([["2 + 2 =", " 4"], ["2 + 2 =", " 4"], ["2 + 2 =", " 5"]])

    assert hashlib.sha256(b'["2 + 2 =", " 4"]').hexdigest()[:16] == once
    assert 3 == len({once, again, other})
    assert hashes_of([["2 + 2 =", " 4"]]) == (once,)


def test_five_hundred_items_of_seven_tasks_take_a_few_kilobytes_and_their_lists_are_kept_once(tmp_path):
    lists = [hashes_of([task, i] for i in range(500)) for task in range(7)]
    for recipe in ("nf4", "rtn"):
        rows = {f"quality.task{n}": Items(hashes, [i % 3 == 0 for i in range(500)], "binary")
                for n, hashes in enumerate(lists)}  # fmt: skip
        stored.save(tmp_path, recipe, rows)

    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert 9 == len(sizes)
    assert [4000] * 7 == [size for name, size in sizes.items() if name.endswith(".hashes")]
    assert sizes["nf4.json"] < 2048


def test_the_same_items_give_the_same_bytes(tmp_path):
    rows = {"a": Items((A, B), (0.5, 0.25), "real"), "b": Items((B, A, C), (1, 0, 1), "binary")}
    stored.save(tmp_path / "one", "nf4", rows)
    stored.save(tmp_path / "two", "nf4", dict(reversed(rows.items())))

    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert bytes.fromhex(A + B if A < B else B + A) in one.values()


@pytest.mark.parametrize(
    ("hashes", "values", "kind", "words"),
    [
        ((A, B), (1,), "binary", "2 items have 1 values"),
        ((), (), "real", "at least one item"),
        ((A, A), (1, 0), "binary", f"item {A} occurs twice"),
        ((A,), (0.5,), "binary", "0.5 must be 0 or 1"),
        ((A,), (math.nan,), "binary", "nan must be 0 or 1"),
        ((A,), (math.inf,), "real", "inf must be a finite number"),
        ((A,), (1e39,), "real", "does not fit in float32"),
        ((A,), (1,), "percent", "kind of items must be one of binary, real, not 'percent'"),
        ((A[:8],), (1,), "real", "16 hexadecimal digits"),
        ((A.upper(),), (1,), "real", "16 hexadecimal digits"),
    ],
)
def test_items_that_cannot_be_are_refused_in_words(hashes, values, kind, words):
    with pytest.raises(MetricError, match=words):
        Items(hashes, values, kind)


def test_reals_are_rounded_as_they_are_stored_so_that_nothing_moves_by_recording():
    given = Items((A,), (0.1,), "real")

    assert struct.unpack("<f", struct.pack("<f", 0.1)) == given.values


# --- beside a baseline ------------------------------------------------------------------------------------------------

F1 = Items(hashes_of(range(40)), [i / 40 for i in range(40)], "real")
ROW = healthy_row("rag.f1", value=F1.mean, items=F1)


def test_a_baseline_has_its_items_again_and_names_their_digest(tmp_path):
    path = recorded([ROW]).save(tmp_path)

    assert F1 == Baseline.load(path).sections[""].rows["rag.f1"].items
    assert F1.digest == json.loads(path.read_text())["rows"]["rag.f1"]["items"]


def test_recording_a_row_without_items_lets_the_old_ones_go(tmp_path):
    recorded([ROW]).save(tmp_path)
    recorded([replace(ROW, items=None)]).save(tmp_path)

    assert Baseline.find(tmp_path, "reference", "nf4").sections[""].rows["rag.f1"].items is None
    assert [] == list((tmp_path / "reference" / "items").glob("nf4*"))


def test_merging_a_run_keeps_the_items_of_what_it_did_not_measure(tmp_path):
    context = {"base_hash": "b1", "data_hash": "d1", "torch": "2.13.0"}
    update(tmp_path, [ROW], context, ROW.device, metrics=HEALTHY_METRICS)
    other = healthy_row("efficiency.layers", value=56.0)
    update(tmp_path, [other], context, ROW.device, metrics=HEALTHY_METRICS)

    found = Baseline.find(tmp_path, "reference", "nf4").sections[""].rows
    assert {"rag.f1": F1, "efficiency.layers": None} == {key: entry.items for key, entry in found.items()}


def _change(find, change):
    def damage(folder):
        (path,) = folder.glob(find)
        path.write_bytes(change(path.read_bytes()))

    return damage


def _json(change):
    def changed(data):
        table = json.loads(data)
        change(table["rows"]["rag.f1"])
        return json.dumps(table).encode()

    return _change("nf4.*.json", changed)


DAMAGES = {
    "not-json": (_change("nf4.*.json", lambda data: data[:-9]), "items"),
    "another-schema": (_change("nf4.*.json", lambda data: data.replace(b'"schema": 1', b'"schema": 2')), "schema=2"),
    "one-value": (_json(lambda row: row.update(values=row["values"][:-4] + "AA==")), "must have the digest"),
    "fewer-values": (_json(lambda row: row.update(values=row["values"][:-8])), "take 160 bytes, not"),
    "no-base64": (_json(lambda row: row.update(values="%" + row["values"][1:])), "row rag.f1"),
    "no-text": (_json(lambda row: row.update(values=None)), "must be a base64 string"),
    "another-kind": (_json(lambda row: row.update(kind="binary")), "take 5 bytes"),
    "another-count": (_json(lambda row: row.update(count=41)), "count=41"),
    "unknown-field": (_json(lambda row: row.update(note=1)), "unknown note"),
    "a-path-for-a-list": (_json(lambda row: row.update(asked="../../../etc/pwd")), "16 hexadecimal digits"),
    "no-list": (lambda folder: next(folder.glob("*.hashes")).unlink(), "cannot be read"),
    "one-bit-of-the-list": (_change("*.hashes", lambda data: bytes([data[0] ^ 1]) + data[1:]), "has been changed"),
    "a-shorter-list": (_change("*.hashes", lambda data: data[:-8]), "has been changed"),
    "no-file": (lambda folder: next(folder.glob("nf4.*.json")).unlink(), "are missing: the folder items/"),
    "no-row": (_change("nf4.*.json", lambda data: b'{"schema": 1, "rows": {}}'), "are missing: the folder items/"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_items_are_refused_by_file_and_way_out(tmp_path, damage, words):
    path = recorded([ROW]).save(tmp_path)
    damage(path.parent / "items")

    with pytest.raises(BaselineError, match=says(words, "nf4.", "" if words == "cannot be read" else "restore it")):
        Baseline.load(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    return recorded([ROW]).save(folder)


@settings(max_examples=100)
@given(data=st.data())
def test_no_flipped_bit_and_no_cut_of_the_files_passes_for_what_was_recorded(sound, data):
    path = data.draw(st.sampled_from(sorted((sound.parent / "items").iterdir())))
    before = path.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    flipped = before[:place] + bytes([before[place] ^ 1 << data.draw(st.integers(0, 7))]) + before[place + 1 :]
    path.write_bytes(data.draw(st.sampled_from([flipped, before[:place]])))
    try:
        assert Baseline.load(sound).sections[""].rows["rag.f1"].items == F1
    except BaselineError as error:
        assert "items" in str(error)
    finally:
        path.write_bytes(before)


def test_importing_items_imports_neither_numpy_nor_torch():
    modules = "bench.results.items, bench.results.journal, bench.results.row"
    code = f"import sys, {modules}; print(sorted(set(sys.modules) & {{'torch', 'numpy'}}))"

    assert completed([sys.executable, "-c", code], check=True).stdout == "[]\n"
