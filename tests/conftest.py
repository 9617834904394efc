"""Lanes and processes of the tests, settings of properties, and fixtures that several files share."""

import gc
import os
import sys

import lanes
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "compression",
    deadline=None,  # machines are shared, and the first call of a kernel compiles it
    max_examples=30,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("compression"), max_examples=1000)
settings.load_profile("compression")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads what it is told
def pytest_cmdline_main(config):
    if workers := lanes.workers(config):
        config.option.numprocesses, config.option.dist = workers, "loadscope"
    elif getattr(config.option, "numprocesses", None) and lanes.of_tests(config):
        config.option.dist = "loadscope" if config.option.dist == "no" else config.option.dist
    if getattr(config.option, "numprocesses", None):
        os.environ["OMP_NUM_THREADS"] = "1"  # of each worker: threads that wait for each other are slower than none


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return lanes.scheduling(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_configure(config):
    config.addinivalue_line("markers", f"{lanes.LANE}: the slow lane, of tests that start, kill or drive processes")
    if hasattr(config, "workerinput"):  # what children and runs in this process inherit says of no worker any more
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
            del os.environ[name]


def pytest_ignore_collect(collection_path, config):
    return (collection_path == lanes.PROCESS and lanes.passed_over(config)) or None


@pytest.hookimpl(tryfirst=True)  # before marks are looked for
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.is_relative_to(lanes.PROCESS):
            item.add_marker(lanes.LANE)
    items[:], slow = lanes.split(config, items)
    config.hook.pytest_deselected(items=slow)


@pytest.fixture(scope="session")
def seen_by_the_collector():
    return set()


@pytest.fixture(autouse=True)
def out_of_sight_of_the_collector(seen_by_the_collector):
    """What is imported by now: compressing collects garbage first, and would look through all of it every time."""
    if len(sys.modules) > len(seen_by_the_collector) + 50:
        seen_by_the_collector.update(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory):
    """Tests neither use nor leave what training keeps for later runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def imported():
    """pytester forgets what a run in this process is the first to import: two copies of a class do not know each other,
    and few libraries can be imported twice. So all but tests and what stands in a folder of pytester's stays."""
    from _pytest import pytester

    class Snapshot(pytester.SysModulesSnapshot):
        def restore(self):
            kept = {name: module for name, module in sys.modules.items() if not self.forgets(name, module)}
            super().restore()
            sys.modules.update(kept)

        def forgets(self, name, module):
            last = name.rpartition(".")[2]
            return last == "conftest" or last.startswith("test_")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytester, "SysModulesSnapshot", Snapshot)
        yield


@pytest.fixture(scope="module")
def student():
    """The reference and its tokenizer."""
    from transformers import GenerationConfig

    from bench.measure import reference_scores

    model, tokenizer = reference_scores.load("student")
    model.generation_config = GenerationConfig()  # a base has none, `generate` and HFLM want one
    return model, tokenizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A checkpoint as transformers writes it; tests that change one take a copy."""
    from checkpoints import transformers_model

    folder = tmp_path_factory.mktemp("base") / "tiny"
    transformers_model("LlamaForCausalLM").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    copied = tmp_path / "tiny"
    copied.mkdir()
    for path in saved.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


@pytest.fixture(scope="module")
def tiny_shapes():
    """Bases by the names of `tiny_models`, such as `random:tiny-llama`."""
    from tiny_models import TINY, fresh_base

    from compression.architectures.random_shapes import SHAPES

    with pytest.MonkeyPatch.context() as patch:
        for name, config in TINY.items():
            patch.setitem(SHAPES, name, config)
        yield
    fresh_base.cache_clear()


@pytest.fixture(scope="session")
def shared():
    """A folder of published data sets."""
    if "BENCH_DATA" not in os.environ:
        pytest.skip("BENCH_DATA names no folder of data sets")
    from bench.data.sources import open_data

    return open_data(os.environ["BENCH_DATA"], base="reference")


@pytest.fixture(scope="session")
def small_judge(tmp_path_factory):
    """A Llama with random weights, which judges without sense."""
    from checkpoints import transformers_model

    from compression.checkpoints.base import byte_tokenizer

    folder = tmp_path_factory.mktemp("judge") / "small"
    transformers_model("LlamaForCausalLM", vocab_size=300, max_position_embeddings=2048).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A Llama that this project did not write: transformers' own random weights, saved by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from compression.checkpoints.base import byte_tokenizer

    folder = tmp_path_factory.mktemp("checkpoints") / "someones-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "test.txt").write_text("The quick brown fox jumps over the lazy dog, twice a day. " * 60)
    return folder


@pytest.fixture
def run(pytester, checkpoint, imported):
    """Run the benchmarks in a repository of somebody else's."""
    from commands import pytest_bench

    def call(*arguments, base=None):
        return pytest_bench(pytester, "--base", base or checkpoint, *arguments)

    return call


@pytest.fixture(scope="session")
def page_results():
    """Rows of several runs, two bases and two devices, and the journal that they are of."""
    from page_rows import results

    return results()


@pytest.fixture(scope="session")
def page_text(page_results):
    from bench.report.page import page

    return page(*page_results)


@pytest.fixture(scope="session")
def page_path(page_text, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(page_text)
    return path


@pytest.fixture(scope="module")
def browser():
    from chromium import chromium

    with chromium() as started:
        yield started
