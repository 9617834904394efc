"""Texts that packages ship: found by entry points, in a clone that is not installed too."""

import sys
from pathlib import Path

import pytest
from checkpoints import says
from processes import completed

import compression
from compression import CompressionError
from compression.calibration import shipped
from compression.calibration.text import open_calibration
from compression.errors import CalibrationError, TrainingError
from compression.training.downstream import open_downstream

ROOT = Path(compression.__file__).parents[1]


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """Installs a distribution of a module whose code is given, as pip lays it out."""

    def install(name, code, point=None):
        (tmp_path / f"{name}.py").write_text(code)
        facts = tmp_path / f"{name}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[compression.texts]\n{point or name} = {name}\n")
        forget()

    def forget():
        from compression.calibration import text

        shipped.shipped.cache_clear()
        text._shipped.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    monkeypatch.undo()
    forget()


def test_texts_of_another_package_are_found_by_name(ship):
    ship("elsewhere", "CALIBRATION = {'poems': lambda: ['a', 'b']}\nDOWNSTREAM = {'sums': lambda: [('1 + 1 =', ' 2')]}")
    base = compression.locate("reference")

    assert {"a", "b"} == set(open_calibration("poems", base).documents(0))
    assert [("1 + 1 =", " 2")] == open_downstream("sums", base).examples()
    assert "embedded" == open_calibration(None, base).name
    assert "arithmetic" == open_downstream(None, base).name


def test_they_are_read_once(ship):
    ship("counted", "READ = []\nCALIBRATION = {'poems': lambda: READ.append(1) or ['a']}")
    base = compression.locate("reference")

    for _ in range(3):
        assert ["a"] == list(open_calibration("poems", base).documents(0))
    assert [1] == sys.modules["counted"].READ


def test_two_of_one_name_are_refused(ship):
    ship("again", "CALIBRATION = {'embedded': lambda: []}")

    with pytest.raises(CompressionError, match=says("again and bench.reference.texts both ship", "'embedded'")):
        open_calibration("embedded", compression.locate("reference"))


def test_one_that_cannot_be_imported_is_said(ship):
    ship("torn", "import nothing_of_this_name")

    with pytest.raises(CompressionError, match=says("texts of torn cannot be imported", "nothing_of_this_name")):
        open_downstream("arithmetic", compression.locate("reference"))


def test_without_any_the_embedded_ones_are_missing_in_words(monkeypatch, ship):
    monkeypatch.setattr(shipped, "entry_points", lambda: [])
    ship("empty", "")
    base = compression.locate("reference")

    with pytest.raises(CalibrationError, match=says("no package that is installed ships the embedded text", "give")):
        open_calibration(None, base)
    with pytest.raises(TrainingError, match=says("downstream task 'arithmetic'", "no package that is installed")):
        open_downstream(None, base)


def test_in_a_clone_that_is_not_installed_the_reference_has_its_text():
    """Isolated from installed distributions: only the clone and the standard library's way to them."""
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from importlib import metadata\n"
        "metadata.entry_points = lambda **_: ()\n"
        "from compression.calibration.shipped import shipped\n"
        "print(len(shipped('CALIBRATION')['embedded']()) > 1000, 'arithmetic' in shipped('DOWNSTREAM'))\n"
        "print('torch' in sys.modules)\n"
    )
    said = completed([sys.executable, "-c", code, str(ROOT)], check=True, cwd="/")

    assert "True True\nFalse\n" == said.stdout
