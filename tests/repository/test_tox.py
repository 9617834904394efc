"""tox.ini: what tox itself refuses, which no other test reads."""

import configparser
import re

import pytest
from docs_pages import ROOT


def _read():
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    return tox


@pytest.mark.parametrize("name", _read().sections())
def test_variables_that_are_passed_stand_one_to_a_line(name):
    """Environments add lines to those of [testenv], and tox takes no line of several then."""
    lines = _read().get(name, "pass_env", fallback="").split("\n")

    assert [] == [line for line in lines if re.search(r"[\s,]", line.strip()) and not line.startswith("{")]
