"""Lines that say how far a run is, where no terminal could show a bar."""

import re
from types import SimpleNamespace

from commands import PERPLEXITY, RTN
from processes import wait_until

from bench.session.progress import Lines

pytest_plugins = ["pytester"]


def item(recipe, name="test_perplexity"):
    return SimpleNamespace(
        nodeid=f"bench/test_quality.py::{name}[{recipe}]",
        callspec=SimpleNamespace(params={"recipe": SimpleNamespace(text=recipe)}),
    )


def written(capfd, pattern):
    """What was written to stderr until the pattern is in it."""
    found = []

    def reached():
        found.append(capfd.readouterr().err)
        return re.search(pattern, "".join(found))

    wait_until(reached)
    return "".join(found)


def test_a_worker_tells_lines_of_long_measurements_and_leaves_finished_recipes_to_others(request):
    told = []
    lines = Lines(request.config, recipes=0, measurements=1, every=0.02, write=told.append)
    protocol = lines.pytest_runtest_protocol(item("nf4"), None)
    next(protocol)
    wait_until(lambda: told)
    for _ in protocol:
        pass
    lines.pytest_sessionfinish()

    assert re.fullmatch(r"\[[0-9:]{8}\] test_perplexity\[nf4\] for \d+ s; 0 of 1 measurements done", told[0])
    assert not any("recipes after" in line for line in told)


def test_a_long_measurement_has_a_line_each_interval_and_a_finished_recipe_one(request, capfd):
    lines = Lines(request.config, recipes=2, measurements=3, every=0.02)
    lines._file, own = 2, lines._file  # the test's stderr instead of that outside of tests
    try:
        tests = [item("nf4", "test_size"), item("nf4"), item("rtn")]
        for one, following in zip(tests, [*tests[1:], None], strict=True):
            protocol = lines.pytest_runtest_protocol(one, following)
            next(protocol)
            lines(3, 30, "compressing")
            name = re.escape(one.nodeid.rpartition("::")[2])
            long = written(capfd, rf"{name} for \d+ .*, compressing: 3 of 30; ")
            assert f"{tests.index(one)} of 3 measurements done" in long
            try:
                protocol.send(True)
            except StopIteration as stop:
                assert stop.value is True
            finished = capfd.readouterr().err
            assert ("of 2 recipes after" in finished) is (one is not tests[0])
    finally:
        lines._file = own
        lines.pytest_sessionfinish()


def test_a_run_without_a_terminal_names_each_recipe_as_it_ends(run, text_folder, capfd):
    result = run(PERPLEXITY, "--model", f"fp16,{RTN}", "--data", text_folder, "--samples", "2", "--length", "32")

    assert result.ret == 0
    told = re.findall(r"\[\d\d:\d\d:\d\d\] (.*)", capfd.readouterr().err)
    assert ["fp16: 1 measurement in", f"{RTN}: 1 measurement in"] == [
        re.match(r".*? in", line).group() for line in told
    ]
    assert "; 2 of 2 recipes after" in told[-1]


def test_a_quiet_run_says_nothing_of_it(run, text_folder, capfd):
    run(PERPLEXITY, "--model", RTN, "--data", text_folder, "--samples", "2", "--length", "32", "-q")

    assert "recipes after" not in capfd.readouterr().err
