"""What runs on a GPU, on an emulated host with two of them: all on the second, while the first is the current one."""

import pytest
import torch
from checkpoints import transformers_model
from commands import FILES, PERPLEXITY, QUICK
from contract_rows import CASES, needs
from emulated_gpus import GRAPH_BROKEN, attend, emulated_host
from packed_layers import pack_linear, sparse_linear
from tiny_models import TASK

import compression
from bench.errors import NotAvailable
from bench.machine import device as machine
from bench.measure.generation import Decoder, Load, _next
from bench.measure.memory import bytes_of, peak_on_cuda
from compression import devices
from compression.cost import CostMeter
from compression.errors import TrainingError
from compression.numeric.grids import AffineGrid
from compression.training.settings import Objective, Settings
from compression.training.trainer import train

pytest_plugins = ["pytester"]
GPU = "cuda:1"
BASE = "random:tiny-qwen2"
LOAD = Load(prompt_tokens=6, new_tokens=5, prompts=2)
EMULATED = [case for case in CASES if "bitsandbytes" not in needs(case.recipe)]  # whose kernels are not
OF_METHODS = {case.method: case for case in EMULATED}  # one for each
EVERYDAY = ["rtn", "gptq", "smoothquant", "slicegpt", "kd"]  # of each unit, one; the slow lane has all


@pytest.fixture
def gpus(imported, monkeypatch):
    with emulated_host(monkeypatch) as host:
        yield host


def on_gpu(model, device=GPU):
    return model.to(device).eval().requires_grad_(False)


@pytest.mark.parametrize("row", [
    pytest.param(row, id=name, marks=[] if name in EVERYDAY else pytest.mark.process)
    for name, row in OF_METHODS.items()
])  # fmt: skip
@pytest.mark.usefixtures("imported", "tiny_shapes")
def test_compressing_on_the_second_gpu_comes_to_what_it_comes_to_on_a_cpu(row, tmp_path, monkeypatch):
    options = {"teacher": "self", "downstream": TASK}
    with monkeypatch.context() as patch:  # attention in torch's own order would round other weights the other way
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        expected = compression.compress(BASE, row.recipe, cache=tmp_path / "cpu", **options).model.state_dict()

    with emulated_host(monkeypatch) as host:
        found = compression.compress(BASE, row.recipe, device=GPU, cache=tmp_path / "gpu", **options)
        state = {name: (tensor.device, tensor.cpu()) for name, tensor in found.model.state_dict().items()}
        places = {index for _, index in host.asked}
        loaded = compression.load(found.save(tmp_path / "saved"), GPU)
        again = {name: tensor.cpu() for name, tensor in loaded.model.state_dict().items()}

    assert {torch.device(GPU)} == {device for device, _ in state.values()}
    assert {1} == places
    assert found.cost.peak_bytes > 0
    assert expected.keys() == state.keys() == again.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name][1], tensor, msg=name)
        assert torch.equal(again[name], state[name][1]), name


# --- what compressing takes -------------------------------------------------------------------------------------------


def test_memory_is_told_while_it_is_measured(gpus):
    """As kept steps and finished blocks are told it: before the end."""
    before = torch.zeros(1000, device=GPU)
    with CostMeter(GPU) as meter:
        kept, passing = torch.zeros(100, device=GPU), torch.zeros(10_000, device=GPU)
        del passing
        inside = meter.cost()

    assert (40_400, 40_400) == (inside.peak_bytes, meter.cost().peak_bytes)
    assert (1000, 100) == (before.numel(), kept.numel())


def test_memory_of_compressing_block_by_block_is_in_the_manifest(gpus, tiny_shapes, tmp_path):
    compression.compress_to(tmp_path / "out", BASE, "rtn", device=GPU)

    assert compression.load(tmp_path / "out").cost.peak_bytes > 0


def test_random_weights_are_the_same_on_every_device(gpus, tiny_shapes):
    """Their digest is that of the seed."""
    here, there = (compression.open_base(BASE, device) for device in ("cpu", GPU))

    assert here.digest == there.digest
    for name, tensor in here.model.state_dict().items():
        assert torch.equal(tensor, there.model.state_dict()[name].cpu())


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_training_stays_on_the_device_of_the_student(device, gpus, tmp_path):
    student = transformers_model("LlamaForCausalLM").to(device)
    ids, seen = torch.arange(80).view(8, 10) % 48, []

    def progress(done, total, what):
        seen.append((gpus.current, torch.are_deterministic_algorithms_enabled()))

    settings = Settings(epochs=1, learning_rate=1e-3, batch=2, accumulation=2, clip=0.5)
    train(student, ids, Objective(alpha=0, temperature=1), settings, tmp_path, progress=progress)

    assert {torch.device(device)} == {parameter.device for parameter in student.parameters()}
    assert {(1, True) if device == GPU else (0, False)} == set(seen)
    assert (0, False) == (gpus.current, torch.are_deterministic_algorithms_enabled())
    assert {0} >= {index for name, index in gpus.asked if device == "cpu"}


def test_bf16_without_hardware_is_refused_before_training(monkeypatch, tmp_path):
    with emulated_host(monkeypatch, capabilities=((8, 0), (7, 5))):
        student = transformers_model("LlamaForCausalLM").to(GPU)
        settings = Settings(epochs=1, learning_rate=1e-3, batch=2, accumulation=1, clip=0.5, bf16=True)
        with pytest.raises(TrainingError, match="compute capability"):
            train(student, torch.zeros(4, 8).long(), Objective(alpha=0, temperature=1), settings, tmp_path)


def test_what_cannot_be_repeated_is_an_error_where_it_has_to_be(gpus):
    """The emulation refuses it as torch does on a GPU, so that the tests above would fail."""
    numbers = torch.rand(10, device=GPU)
    numbers.cumsum(0)
    with devices.repeatable(GPU), pytest.raises(RuntimeError, match="deterministic"):
        numbers.cumsum(0)
    with devices.repeatable("cpu"):
        assert not torch.are_deterministic_algorithms_enabled()


# --- kernels ----------------------------------------------------------------------------------------------------------


def packed(bits, group_size, device, rows=64, cols=256):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    return pack_linear(weight, None, AffineGrid(bits=bits, group_size=group_size, symmetric=False)).eval()


def test_a_layer_has_the_kernel_that_its_own_gpu_can_run(monkeypatch):
    x = torch.randn(2, 256).bfloat16()
    with emulated_host(monkeypatch, capabilities=((7, 5), (8, 0))) as host:
        for current in (0, 1):
            host.current = current
            old, new = packed(4, 64, "cuda:0"), packed(4, 64, "cuda:1")
            assert ("dequantize", "int4") == (old.kernel_name(), new.kernel_name())
            for layer in (old, new):
                here = x.to(layer.weight_part.codes.device)
                torch.testing.assert_close(layer(here).cpu(), layer.reference(here).cpu(), rtol=0.02, atol=0.1)


@pytest.mark.parametrize(("rows", "by_kernel"), [(1, True), (8, True), (9, False), (128, False)])
def test_the_8_bit_kernel_of_cuda_has_the_rows_of_a_decode_step_and_not_those_of_a_prefill(rows, by_kernel, gpus):
    layer, x = packed(8, -1, GPU), torch.randn(1, rows, 256).bfloat16().to(GPU)
    gpus.functions.clear()

    y = layer(x)

    assert by_kernel == (torch.ops.aten._weight_int8pack_mm.default in gpus.functions)
    torch.testing.assert_close(y.cpu(), layer.reference(x).cpu(), rtol=0.02, atol=0.2)


def sparse(device):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    return sparse_linear(weight.masked_fill(torch.arange(64) % 2 == 0, 0).to(device), None, (2, 4))


@pytest.mark.parametrize("library", [True, False])
def test_a_sparse_layer_asks_the_driver_once_and_multiplies_without_the_library_too(library, gpus, monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: library)
    made = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: made.append(weight) or weight)
    layer, x = sparse(GPU), torch.randn(3, 64).bfloat16().to(GPU)
    gpus.asked.clear()

    products = [layer(x).cpu() for _ in range(3)]

    assert library == (len(made) == 1)
    assert [("get_device_capability", 1)] * library == gpus.asked
    assert ("semi_structured" if library else "densify") == layer.kernel_name()
    for product in products:
        assert torch.equal((x @ layer.weight.t()).cpu(), product)


# --- generating -------------------------------------------------------------------------------------------------------


def model_of(device=GPU, architecture="MistralForCausalLM", **sizes):
    return on_gpu(transformers_model(architecture, **sizes), device)


def tokens_of(decoder):
    """What is generated from the first prompt."""
    with torch.inference_mode(), devices.on(decoder.device):
        cache, step = decoder._graph_step() if decoder.mode == "graph" else (decoder._new_cache(), None)
        token = _next(decoder.model, decoder._prompts[0], cache)
        step, found = step or decoder._step(cache), [int(token)]
        for position in range(decoder.load.prompt_tokens, decoder._length - 1):
            found.append(int(token := step(token, position)))
    return found


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"])
def test_a_replayed_graph_generates_what_eager_steps_do(architecture, gpus):
    model = model_of(architecture=architecture)
    eager, graph = (Decoder(model, LOAD, mode=mode) for mode in ("eager", "graph"))

    assert tokens_of(eager) == tokens_of(graph) == tokens_of(graph)
    assert 5 == len(tokens_of(eager))
    found = graph.run(1)
    assert 4 == len(found.steps_s)
    assert {1} == {index for _, index in gpus.asked}


def test_a_graph_is_refused_where_the_text_passes_a_sliding_window(gpus, monkeypatch):
    decode = Decoder(model_of(sliding_window=8), LOAD)
    assert 5 == len(tokens_of(decode))
    with pytest.raises(NotAvailable, match="11 positions exceed the sliding window of 8"):
        Decoder(model_of(sliding_window=8), LOAD, mode="graph")
    assert tokens_of(Decoder(model_of(sliding_window=11), LOAD, mode="graph"))

    monkeypatch.setattr("bench.measure.generation._window_refusal", lambda cache, length: None)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        tokens_of(Decoder(model_of(sliding_window=8), LOAD, mode="graph"))


def test_a_step_that_waits_for_the_gpu_cannot_be_captured(gpus):
    """The emulation refuses it as CUDA does, so that the tests above would fail."""
    number = torch.ones(1, device=GPU)
    with pytest.raises(RuntimeError, match=GRAPH_BROKEN), torch.cuda.graph(torch.cuda.CUDAGraph()):
        float(number)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: packed(4, 64, GPU), lambda: sparse(GPU)], ids=["packed", "sparse"])
def test_the_peak_of_a_model_does_not_depend_on_what_ran_before(make, gpus, monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())
    fresh, used = make(), make()
    x = torch.ones(1, fresh.in_features, device=GPU, dtype=torch.bfloat16)
    used(x)

    readings = [peak_on_cuda(lambda layer=layer: layer(x), model=layer, device=GPU, stored_bytes=1)
                for layer in (fresh, used, fresh)]  # fmt: skip

    assert 1 == len(set(readings))
    assert bytes_of(fresh, device=GPU) == readings[0].model_bytes < readings[0].peak_bytes


def test_the_emulated_gpu_is_known(gpus):
    assert "cuda-emulated-gpu-16gib" == machine.fingerprint(GPU)
    assert "8.0" == machine.describe(GPU)["capability"]


@pytest.mark.process
def test_every_measurement_runs_on_the_second_gpu(run, text_folder, monkeypatch):
    """Time, size, memory, cost and quality, of a packed, a sparse and a trained model; nothing asks the first GPU."""
    recipes = "rtn(group_size=32),sparsegpt(pattern=2:4,store=nm,samples=4,sequence_length=32)"
    with emulated_host(monkeypatch) as host:
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
        result = run(
            FILES / "test_efficiency.py", PERPLEXITY, "-k", "not energy", "--device", GPU, "--model", recipes,
            "--calibration", "random", "--data", text_folder, "--samples", "2", "--length", "32", *QUICK,
        )  # fmt: skip
        assert {1} == {index for _, index in host.asked}
    result.assert_outcomes(passed=12)
