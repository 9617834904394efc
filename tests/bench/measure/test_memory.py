import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.errors import BenchError, MetricError, OptionError
from bench.machine import device as machine
from bench.measure.generation import Load
from bench.measure.memory import ChildSpec, MemoryReading, bytes_of, peak_in_child, peak_on_cuda
from bench.measure.memory_process import anonymous_memory
from bench.metrics.memory import memory_efficiency, peak_memory_mb

MIB = 2**20
SPEC = ChildSpec(kind="base", target="nothing", load=Load(), threads=1)

# A child that measures what `load` and `run` do, as the real one measures a model.
HEAD = """
import json, sys, time
from bench.measure.memory_process import measure
LOADS = 1
def fill(mib):
    return b"x" * (mib << 20)
"""
TAIL = """
loaded, peaks, source = measure(load, run, loads=LOADS)
print("a library greets")
print(json.dumps({"peaks": peaks, "model_bytes": 1, "source": source}))
"""


def child(body, **options):
    command = (sys.executable, "-c", HEAD + body + TAIL)
    return peak_in_child(SPEC, stored_bytes=1, command=command, **options)


def figures(text):
    return peak_in_child(SPEC, stored_bytes=1, command=(sys.executable, "-c", f"print({text!r})"))


linux = pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told by Linux alone")


@linux
def test_what_is_held_and_what_is_used_for_a_moment_make_the_peak():
    reading = child("""
before = fill(100)
load = lambda: fill(64)
def run(held):
    fill(32)
""")

    assert abs(reading.peak_bytes - 96 * MIB) < 3 * MIB
    assert reading.source == "RssAnon of a child process"


@linux
def test_what_loading_used_and_gave_back_does_not_count():
    reading = child("""
def load():
    unused = fill(64)
    return fill(16)
run = lambda held: None
""")

    assert abs(reading.peak_bytes - 16 * MIB) < 3 * MIB


@linux
def test_each_load_but_the_first_has_a_peak_of_its_own():
    reading = child("""
LOADS = 4
loaded, kept = iter((8, 16, 64, 24)), []
load = lambda: fill(next(loaded))
run = lambda held: kept.append(fill(50)) if not kept else None  # what is kept for good, the first time
""")

    assert [round(peak / MIB / 8) for peak in reading.peaks] == [2, 8, 3]
    assert reading.peak_bytes == sorted(reading.peaks)[1]
    assert [each.peak_bytes for each in reading.each()] == list(reading.peaks)


@linux
def test_where_the_high_water_mark_is_not_told_readings_are_taken_in_turn():
    reading = child("""
from bench.measure import memory_process
def untold(): raise LookupError
memory_process._high_water = untold
known, reads = memory_process.anonymous_memory, []
def counted():
    read, source = known()
    return lambda: reads.append(1) or read(), source
memory_process.anonymous_memory = counted
def seen():  # by a reading that began after the call
    until = len(reads) + 2
    while len(reads) < until: time.sleep(0.001)
load = lambda: fill(64)
def run(held):
    moment = fill(32)
    seen()
    del moment
    seen()
""")

    assert abs(reading.peak_bytes - 96 * MIB) < 3 * MIB


@pytest.mark.parametrize(
    ("hidden", "source"),
    [
        ({"/proc/self/status"}, "Anonymous"),
        ({"/proc/self/status", "/proc/self/smaps_rollup"}, "unique set size"),
    ],
    ids=["old-kernel", "no-linux"],
)
@linux
def test_without_the_kernels_sum_memory_is_read_elsewhere_and_the_source_says_so(monkeypatch, hidden, source):
    text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: "" if str(path) in hidden else text(path))

    read, named = anonymous_memory()

    assert named == source
    assert MIB < read() < machine.memory_total("cpu")


def test_a_child_that_is_killed_is_an_error_that_says_so():
    with pytest.raises(BenchError, match="killed by SIGKILL, most likely because memory ran out"):
        child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


@linux
def test_a_child_that_runs_out_of_memory_is_an_error_with_its_last_words():
    with pytest.raises(BenchError, match=r"failed with exit status 1: .*MemoryError"):
        child("""
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
load, run = lambda: fill(4096), print
""")


def test_a_child_that_hangs_is_ended():
    with pytest.raises(BenchError, match=r"took longer than 0\.5 s"):
        child("time.sleep(600)", timeout=0.5)


@pytest.mark.parametrize(
    "text", ["", "done", "[1]", '{"peaks": [5]}', '{"peaks": [], "model_bytes": 1, "source": "x"}', "3"]
)
def test_a_child_that_gives_no_figures_is_an_error(text):
    with pytest.raises(BenchError, match="did not end with a line of JSON"):
        figures(text)


def test_a_peak_of_nothing_is_refused():
    with pytest.raises(MetricError, match="peak_bytes must be above 0, not 0"):
        figures(json.dumps({"peaks": [0], "model_bytes": 1, "source": "child"}))


def test_the_child_is_told_what_to_measure():
    code = "import json, sys; spec = json.load(sys.stdin); print(json.dumps(" + (
        "{'peaks': 3 * [spec['load']['prompt_tokens']], 'model_bytes': spec['threads'], 'source': spec['target']}))"
    )
    spec = ChildSpec(kind="artefact", target="folder", load=Load(prompt_tokens=77), threads=4)

    reading = peak_in_child(spec, stored_bytes=5, command=(sys.executable, "-c", code))

    assert reading == MemoryReading(peak_bytes=77, model_bytes=4, stored_bytes=5, source="folder", peaks=(77, 77, 77))


@pytest.mark.parametrize("wrong", [{"kind": "model"}, {"threads": 0}, {"loads": 0}])
def test_a_request_that_cannot_be_is_refused_before_a_process_starts(wrong):
    with pytest.raises(OptionError, match=f"{next(iter(wrong))} must be "):
        ChildSpec(**{"kind": "base", "target": "x", "load": Load(), "threads": 1} | wrong)


def test_every_tensor_a_model_holds_counts_however_it_hangs_there():
    model = torch.nn.Linear(10, 10, bias=False)  # 400 bytes
    model.register_buffer("codes", torch.zeros(7, dtype=torch.uint8), persistent=False)
    model.kernel_layout = {"rows": [torch.zeros(3)]}
    model.weight.state = SimpleNamespace(scales=torch.zeros(5), nested=SimpleNamespace(scales=torch.zeros(2)))
    model.itself = model

    assert bytes_of(model) == 400 + 7 + 12 + 20 + 8


def semi_structured():
    """A 2:4 weight in the layout of cuSPARSELt, as torch holds it; a wrapper around 2304 numbers."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    packed = torch.zeros(64 * 32 + 64 * 4, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return SparseSemiStructuredTensorCUSPARSELT(torch.Size([64, 64]), packed, None, None, None, None)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (semi_structured, 2 * 2304),
        (lambda: torch.eye(4).to_sparse(), 4 * 4 + 2 * 4 * 8),
        (lambda: torch.sparse_csr_tensor(torch.arange(5), torch.arange(4), torch.ones(4)), 4 * 4 + (5 + 4) * 8),
        (lambda: torch.sparse_csc_tensor(torch.arange(5), torch.arange(4), torch.ones(4)), 4 * 4 + (5 + 4) * 8),
    ],
    ids=["2:4", "coo", "csr", "csc"],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_tensor_without_storage_counts_as_what_it_consists_of(make, expected):
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.kept, layer.again = (tensor := make()), [tensor]

    assert 16 + expected == bytes_of(layer)


def test_a_tensor_whose_bytes_torch_does_not_show_is_named():
    with pytest.raises(MetricError, match="_mkldnn"):
        bytes_of([torch.zeros(4, 4).to_mkldnn()])


def test_storage_that_is_shared_counts_once():
    weight = torch.zeros(100)

    assert bytes_of([weight, weight[:10], torch.nn.Parameter(weight)]) == 400


def test_tensors_that_are_nowhere_or_elsewhere_do_not_count():
    tensors = [torch.zeros(10, device="meta"), torch.zeros(10)]

    assert (bytes_of(tensors), bytes_of(tensors, device="cpu")) == (40, 40)


@pytest.fixture
def allocator(monkeypatch):
    """A CUDA allocator that holds 5000 bytes of another model, and 400 of this model's weight."""
    state = SimpleNamespace(allocated=5400, peak=10**9, log=[])
    monkeypatch.setattr(machine, "device_of", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: state.log.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: state.log.append("empty"))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {
        "requested_bytes.all.current": state.allocated, "requested_bytes.all.peak": state.peak
    })  # fmt: skip

    def reset(device):
        state.log.append("reset")
        state.peak = state.allocated

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    return state


def test_another_model_on_the_same_gpu_is_left_out_exactly(allocator):
    def work():
        allocator.log.append("work")
        allocator.peak += 700

    reading = peak_on_cuda(work, model=torch.nn.Linear(10, 10, bias=False), device="cuda", stored_bytes=400)

    assert (reading.peak_bytes, reading.model_bytes) == (1100, 400)
    assert allocator.log == ["work", "wait", "empty", "reset", "work", "wait"]


def test_a_model_that_the_allocator_does_not_know_is_refused(allocator):
    allocator.allocated = 0

    with pytest.raises(MetricError, match="another allocator"):
        peak_on_cuda(lambda: None, model=torch.nn.Linear(10, 10), device="cuda", stored_bytes=400)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the real allocator was not asked")
def test_the_peak_on_a_real_gpu_is_the_model_and_what_the_work_allocates():
    model = torch.nn.Linear(1024, 1024, bias=False, device="cuda")
    other = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")

    def work():
        torch.ones(32 * MIB, dtype=torch.uint8, device="cuda")

    reading = peak_on_cuda(work, model=model, device="cuda", stored_bytes=4 * MIB)

    assert reading.peak_bytes == 36 * MIB
    assert other.numel() == 64 * MIB


def test_the_papers_megabytes_are_mebibytes():
    assert peak_memory_mb(MemoryReading(peak_bytes=7010 * MIB, model_bytes=1, stored_bytes=1, source="")) == 7010.0


def test_a_stored_model_larger_than_its_peak_is_an_error_and_not_a_figure_above_one():
    stored = round(13.49 * 2**30)
    paper = MemoryReading(peak_bytes=7010 * MIB, model_bytes=1, stored_bytes=stored, source="one of two GPUs")

    with pytest.raises(MetricError, match="one of two GPUs"):
        memory_efficiency(paper)


def test_memory_efficiency_is_the_stored_share_of_the_peak():
    assert memory_efficiency(MemoryReading(peak_bytes=400, model_bytes=1, stored_bytes=100, source="")) == 0.25


@pytest.mark.process
@linux
def test_a_real_model_in_its_own_process_peaks_little_above_its_weights(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    model.save_pretrained(tmp_path)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())

    spec = ChildSpec(kind="base", target=str(tmp_path), load=Load(prompt_tokens=32, new_tokens=4), threads=1)
    reading = peak_in_child(spec, stored_bytes=weights)

    assert weights <= reading.model_bytes < 1.001 * weights
    assert 0.98 * weights < reading.peak_bytes < weights + 12 * MIB
