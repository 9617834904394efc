"""Files are replaced whole or not at all, and keep their mode."""

import os

import pytest

from bench.files import replacing, write_whole


def test_a_file_is_made_and_replaced_and_nothing_else_is_left(tmp_path):
    for content in (b"first", b"second, longer"):
        write_whole(tmp_path / "file", content)

        assert content == (tmp_path / "file").read_bytes()
        assert ["file"] == os.listdir(tmp_path)


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_whole(path, b"new")

    assert (b"new", mode) == (path.read_bytes(), path.stat().st_mode & 0o777)


def test_until_it_is_whole_a_reader_has_the_old_one_and_a_failure_leaves_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_bytes(b"half")
        assert b"old" == path.read_bytes()
        assert beside.parent == path.parent
        raise ZeroDivisionError

    assert b"old" == path.read_bytes()
    assert ["file"] == os.listdir(tmp_path)


def test_what_was_never_written_replaces_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass

    assert b"old" == path.read_bytes()
