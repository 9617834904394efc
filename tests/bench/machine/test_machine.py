import json
import re
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import completed

from bench.errors import BenchError, OptionError
from bench.machine import device as machine

NAMES = {  # as drivers give them
    "Tesla T4": "t4",
    "Tesla V100-SXM2-16GB": "v100 sxm2",
    "Tesla V100-PCIE-32GB": "v100 pcie",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA A100-PCIE-40GB": "a100 pcie 40gb",
    "NVIDIA A100-SXM4-80GB": "a100 sxm4 80gb",
    "NVIDIA A100 80GB PCIe": "a100 pcie 80gb",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA H100 80GB HBM3": "h100 hbm3 80gb",
    "NVIDIA H100 PCIe": "h100 pcie",
    "NVIDIA H100 NVL": "h100 nvl",
    "NVIDIA H200": "h200",
    "NVIDIA GeForce RTX 4090": "rtx 4090",
    "NVIDIA RTX A6000": "rtx a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx 6000 ada",
}
STRANGERS = [
    "NVIDIA GeForce RTX 3080 Ti",
    "NVIDIA GeForce RTX 4070 SUPER",
    "NVIDIA GeForce RTX 4080 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A10-24Q",
    "Quadro RTX 6000",
    "NVIDIA H20",
    "",
]


class NVMLError(Exception):
    pass


def fake_nvml(**answers):
    """The calls of pynvml that we use; one that has no answer is not supported, as a driver says it."""

    def ask(question):
        def answer(handle, *_):
            if question not in answers:
                raise NVMLError("Not Supported")
            value = answers[question]
            return value() if callable(value) else value

        return answer

    questions = ["TotalEnergyConsumption", "PowerUsage", "EnforcedPowerLimit", "ClockInfo", "MaxClockInfo"]
    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "570.1",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        **{f"nvmlDeviceGet{question}": ask(question) for question in questions},
    )


@pytest.fixture
def gpu(monkeypatch):
    """Installs a GPU by name, and NVML with the answers given."""

    def install(name, *, memory=16 * 10**9, **answers):
        facts = SimpleNamespace(name=name, total_memory=memory, uuid="0000", major=7, minor=5)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory // 2, memory))
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**answers))

    return install


@pytest.fixture
def cpu(monkeypatch):
    """Installs a CPU by its model name."""
    return lambda model: monkeypatch.setattr(machine, "_cpu_facts", lambda: {"model name": model})


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_found_by_the_name_its_driver_gives(name):
    assert machine.PEAKS[NAMES[name]] is machine.find_gpu(name)


@pytest.mark.parametrize("name", STRANGERS)
def test_a_gpu_that_no_row_describes_is_not_taken_for_a_neighbour(name):
    assert machine.find_gpu(name) is None


@pytest.mark.parametrize("key", machine.PEAKS)
def test_a_row_has_the_ratios_that_its_tensor_cores_have(key):
    flops = machine.PEAKS[key].flops_per_s

    assert flops["float32"] <= flops.get("tf32", flops["float32"]) <= flops["float16"] <= 2e15 * 2
    assert flops.get("bfloat16", flops["float16"]) == flops["float16"]
    if "int8" in flops:
        assert round(flops["int8"] / flops["float16"], 1) in (2.0, 4.0)
    if "float8" in flops:
        assert flops["float8"] / flops["float16"] == pytest.approx(2, rel=0.02)


def test_the_reference_point_of_the_paper_is_in_the_table():
    t4 = machine.find_gpu("Tesla T4")

    assert (t4.flops_per_s["float16"], t4.watts) == (65e12, 70)


def test_the_fingerprint_of_this_machine_is_the_same_twice_and_safe_in_a_file_name():
    name = machine.fingerprint("cpu")

    assert name == machine.fingerprint("cpu")
    assert re.fullmatch(r"cpu-[a-z0-9-]+-\d+t", name)


def test_the_fingerprint_of_a_cpu_names_model_family_and_threads(monkeypatch):
    facts = {"model name": "AMD EPYC 7763 64-Core Processor", "cpu family": "25", "model": "1"}
    monkeypatch.setattr(machine, "_cpu_facts", lambda: facts)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    assert machine.fingerprint("cpu") == "cpu-amd-epyc-7763-f25m1-avx2-2t"


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("Tesla T4", 15_637_086_208, "cuda-tesla-t4-15gib"),
        ("NVIDIA H100 80GB HBM3", 85 * 10**9, "cuda-nvidia-h100-80gb-hbm3"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5 * 10**9, "cuda-nvidia-a100-sxm4-40gb-mig-1g-5gb"),
    ],
)
def test_the_fingerprint_of_a_gpu_has_its_memory_once(gpu, name, memory, expected):
    gpu(name, memory=memory)

    assert machine.fingerprint("cuda") == expected


def test_what_is_known_of_this_machine_goes_through_json_unchanged():
    facts = machine.describe("cpu")

    assert facts == json.loads(json.dumps(facts))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["fingerprint"] == machine.fingerprint("cpu")


def test_what_the_driver_does_not_tell_of_a_gpu_is_none_and_not_an_error(gpu):
    gpu("Tesla T4", EnforcedPowerLimit=70_000, ClockInfo=585)

    facts = machine.describe("cuda")

    assert (facts["power_limit_watts"], facts["sm_clock_mhz"], facts["sm_clock_max_mhz"]) == (70.0, 585.0, None)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_a_device_that_has_no_meaning_is_refused_with_those_that_have(device):
    with pytest.raises(OptionError, match=r"must be cpu, cuda or cuda:<n>"):
        machine.device_of(device)


def test_a_gpu_that_is_not_there_is_refused(gpu):
    gpu("Tesla T4")

    with pytest.raises(OptionError, match="available: cuda:0"):
        machine.device_of("cuda:1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_on_a_machine_without_it_is_refused():
    with pytest.raises(OptionError, match="finds no CUDA device"):
        machine.fingerprint("cuda")


def test_the_power_that_is_given_is_the_power_that_is_charged():
    assert (machine.tdp("cpu", 45).watts, machine.tdp("cpu", 45).source) == (45, "option")


@pytest.mark.parametrize("watts", [0, -1, float("nan"), float("inf")])
def test_a_power_that_cannot_be_is_refused(watts):
    with pytest.raises(OptionError, match="finite number of watts above 0"):
        machine.tdp("cpu", watts)


@settings(deadline=None)
@given(threads=st.integers(1, 512))
def test_threads_are_charged_their_cores_and_never_more_than_the_part(threads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_cpu_facts", lambda: {"model name": "AMD EPYC 7763 64-Core Processor"})
        patch.setattr(torch, "get_num_threads", lambda: threads)
        power = machine.tdp("cpu")

    assert (min(280, 280 * threads / 64), "table") == (power.watts, power.source)


def test_an_unknown_cpu_is_charged_an_assumption_that_names_it(cpu):
    cpu("Z80")

    power = machine.tdp("cpu")

    assert power.source == "assumed"
    assert "'Z80'" in power.note
    assert 1 < power.watts / torch.get_num_threads() < 10


@pytest.mark.parametrize(
    ("name", "answers", "expected"),
    [
        ("Tesla T4", {"EnforcedPowerLimit": 60_000}, (60.0, "nvml")),
        ("Tesla T4", {}, (70.0, "table")),
        ("NVIDIA Nobody", {}, (300.0, "assumed")),
    ],
)
def test_the_power_of_a_gpu_comes_from_its_driver_then_its_sheet_then_an_assumption(gpu, name, answers, expected):
    gpu(name, **answers)

    power = machine.tdp("cuda")

    assert expected == (power.watts, power.source)


def test_nvml_without_its_library_says_what_to_install(gpu, monkeypatch):
    gpu("Tesla T4")
    monkeypatch.setitem(sys.modules, "pynvml", None)

    with pytest.raises(BenchError, match="pip install nvidia-ml-py"):
        machine.Nvml("cuda")


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 80GB HBM3", "float8_e4m3fn", 1978.9e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("Tesla T4", "float16", 65e12),
    ],
)
def test_the_peak_of_a_known_gpu_is_its_data_sheets(gpu, name, dtype, expected):
    gpu(name)

    peak = machine.peak_flops("cuda", dtype)

    assert (expected, "table") == (peak.flops_per_s, peak.source)


def test_a_gpu_without_the_dtype_is_held_to_its_fp32_and_says_so(gpu):
    gpu("Tesla T4")

    peak = machine.peak_flops("cuda", "bfloat16")

    assert peak.flops_per_s == 8.1e12
    assert "no bfloat16" in peak.note


def test_fp32_is_held_to_tf32_where_torch_may_use_it(gpu, monkeypatch):
    gpu("NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")

    assert machine.peak_flops("cuda", "float32").flops_per_s == 156e12


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(machine, "_MEASURE_SECONDS", 0.1)
    machine._measured_peak.cache_clear()
    yield
    machine._measured_peak.cache_clear()


def test_an_unknown_device_is_measured_once_and_its_threads_are_given_back(quick):
    before = torch.get_num_threads()

    peak = machine.peak_flops("cpu", torch.float32, threads=1)

    assert peak is machine.peak_flops("cpu", "float32", threads=1)
    assert (peak.source, torch.get_num_threads()) == ("measured", before)
    assert peak.flops_per_s > 0


def test_a_slow_dtype_is_held_to_the_fp32_of_its_machine(quick, monkeypatch):
    rates = {"bfloat16": 2e9, "float32": 150e9}
    monkeypatch.setattr(machine, "_matmul_rate", lambda device, dtype, seconds: rates[dtype])

    peak = machine.peak_flops("cpu", "bfloat16")

    assert peak.flops_per_s == 150e9
    assert "bfloat16 2 GFLOP/s, float32 150 GFLOP/s" in peak.note


def test_a_dtype_that_a_matmul_cannot_measure_is_refused():
    with pytest.raises(OptionError, match="must be one of float32, float16, bfloat16"):
        machine.peak_flops("cpu", "int8")


def test_free_memory_is_part_of_what_there_is():
    assert 0 < machine.memory_free("cpu") <= machine.memory_total("cpu") <= psutil.virtual_memory().total


def test_the_memory_of_a_gpu_is_what_its_driver_says(gpu):
    gpu("Tesla T4", memory=16 * 10**9)

    assert (machine.memory_free("cuda"), machine.memory_total("cuda")) == (8 * 10**9, 16 * 10**9)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "max", "memory.current": "5", "memory.stat": ""}, (sys.maxsize, 0)),
        ({"memory.max": "100", "memory.current": "50", "memory.stat": "anon 1\ninactive_file 20\n"}, (100, 30)),
        (
            {
                "memory/memory.limit_in_bytes": "100",
                "memory/memory.usage_in_bytes": "50",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 1\n",
            },
            (100, 49),
        ),
        ({}, (sys.maxsize, 0)),
    ],
    ids=["no-limit", "version-2", "version-1", "no-group"],
)
def test_the_limit_of_a_container_bounds_its_memory(tmp_path, files, expected):
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    assert expected == machine._cgroup(tmp_path)


def test_importing_the_measurements_of_efficiency_imports_no_torch():
    modules = "bench.machine.device, bench.metrics.compute, bench.metrics.energy, bench.measure.memory_process"
    heavy = "{'torch', 'transformers', 'pynvml', 'psutil', 'numpy'}"
    code = f"import sys, {modules}; print(*sorted({heavy} & set(sys.modules)))"

    done = completed([sys.executable, "-c", code], check=True)

    assert done.stdout.split() == []
