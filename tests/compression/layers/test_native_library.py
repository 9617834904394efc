"""The compiled kernel is loaded only if it is what this user compiled: what others plant, change or cut off is not."""

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from processes import completed

from compression.layers.kernels import lut4, native_library

pytestmark = pytest.mark.skipif(not lut4.available(), reason=f"no native kernel: {lut4.reason()}")

PLANTED = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void run(void) { FILE *f = fopen(getenv("PLANTED"), "w"); if (f) fclose(f); }
int lut4_matmul(void) { return 0; }
const char *lut4_isa(void) { return "planted"; }
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PLANTED", str(tmp_path / "it ran"))
    return tmp_path / "cache" / "native"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A library that would leave a file if it were loaded."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "it.c").write_text(PLANTED)
    completed(["cc", "-shared", "-fPIC", "-o", folder / "it.so", folder / "it.c"], check=True)
    return folder / "it.so"


def build():
    """What a new process would load: the portable kernel, and why there is none."""
    library, _, why = lut4._load.__wrapped__("portable")
    return library and library.lut4_isa(), why


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The file that a build leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSION_CACHE", str(tmp_path_factory.mktemp("good")))
        assert (b"portable", None) == build()
        (path,) = Path(os.environ["COMPRESSION_CACHE"], "native").iterdir()
    return path


def holds(folder):
    (path,) = folder.glob("lut4-*.so")
    return path.read_bytes()


def test_the_folder_is_closed_and_the_second_start_compiles_nothing(cache, monkeypatch):
    os.umask(os.umask(0))  # whatever it is
    assert (b"portable", None) == build()
    assert 0o700 == stat.S_IMODE(cache.stat().st_mode)

    monkeypatch.setattr(lut4, "_build", lambda *arguments: pytest.fail("compiled again"))
    assert (b"portable", None) == build()


DAMAGES = {
    "a changed byte": lambda data, planted: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "cut off": lambda data, planted: data[: len(data) // 2],
    "empty": lambda data, planted: b"",
    "another library": lambda data, planted: planted.read_bytes(),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_file_that_was_changed_is_compiled_anew_and_never_loaded(cache, good, planted, tmp_path, what):
    cache.mkdir(parents=True, mode=0o700)
    (cache / good.name).write_bytes(DAMAGES[what](good.read_bytes(), planted))

    assert (b"portable", None) == build()
    assert good.read_bytes() == holds(cache)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("what", ["a link", "open to others", "of another user"])
def test_a_file_with_the_right_name_and_digest_that_others_could_have_put_there_is_not_loaded(
    cache, good, planted, tmp_path, monkeypatch, what
):
    key = good.stem.split("-")[1]
    with planted.open("rb") as file:
        name = f"lut4-{key}-{native_library._digest(file.fileno())}.so"
    cache.mkdir(parents=True, mode=0o700)
    if what == "a link":
        (cache / name).symlink_to(planted)
    else:
        shutil.copy(planted, cache / name)
        (cache / name).chmod(0o777 if what == "open to others" else 0o700)
    if what == "of another user":
        if os.geteuid():
            pytest.skip("only root can give files away")
        os.chown(cache / name, 12345, 12345)

    assert (b"portable", None) == build()
    assert not (tmp_path / "it ran").exists()


def test_the_planted_library_would_have_run(planted, tmp_path):
    """Negative control."""
    code = f"import ctypes; ctypes.CDLL({str(planted)!r})"
    completed([sys.executable, "-c", code], check=True, env={**os.environ, "PLANTED": str(tmp_path / "it ran")})

    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize("what", ["a link", "of another user", "a file"])
def test_a_folder_that_is_not_this_users_alone_is_not_used(cache, good, tmp_path, caplog, what):
    cache.parent.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(good, elsewhere / good.name)
    before = sorted(elsewhere.iterdir())
    if what == "a link":
        cache.symlink_to(elsewhere)
    elif what == "a file":
        cache.write_text("in the way")
    else:
        if os.geteuid():
            pytest.skip("only root can give folders away")
        shutil.copytree(elsewhere, cache)
        os.chown(cache, 12345, 12345)

    assert (b"portable", None) == build()
    assert "not kept for later processes" in caplog.text
    assert before == sorted(elsewhere.iterdir())


def test_an_open_folder_of_this_user_is_closed(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)

    assert (b"portable", None) == build()
    assert 0o700 == stat.S_IMODE(cache.stat().st_mode)


def test_without_any_private_place_there_are_words_and_no_kernel(cache, monkeypatch):
    cache.parent.mkdir()
    cache.write_text("in the way")

    def none(*arguments, **options):
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.TemporaryDirectory", none)

    assert (None, "no usable temporary directory") == build()
