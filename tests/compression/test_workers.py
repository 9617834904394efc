"""Processes that share work: what each gets to do, what they tell each other, and what is refused."""

import pytest
import torch
from checkpoints import says, transformers_model
from hypothesis import given
from hypothesis import strategies as st
from threads import together
from torch import nn

import compression
from compression import CompressionError, LayerError, RecipeError, WorkerError
from compression.workers import ALONE, dealt, joined


@given(st.lists(st.integers(1, 1000), max_size=30), st.integers(1, 8))
def test_no_worker_has_more_to_do_than_its_share_and_one_job(costs, count):
    owners = dealt(costs, count)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(count)]

    assert len(costs) == len(owners) and set(owners) <= set(range(count))
    assert max(loads) <= sum(costs) / count + max(costs, default=0)


def test_the_dearest_job_goes_first():
    assert [1, 0, 1] == dealt([1, 3, 2], 2)


VALUES = [
    None,
    {"a": [1, 2.5, "x"]},
    torch.arange(12.0).view(3, 4).t(),
    torch.arange(24)[::2],
    torch.randn(2, 3, 4).to(torch.bfloat16).permute(2, 0, 1),
    torch.zeros(0, 3),
    torch.tensor(3),
    torch.tensor([True, False]),
    torch.randn(4).to(torch.float8_e4m3fn),
    torch.zeros(1, 4).expand(3, 4),
]


def bytes_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def test_an_object_comes_through_with_the_bytes_and_strides_of_its_tensors():
    received = together(lambda group: group.everyone(VALUES)[1], 2)[0]

    assert VALUES[:2] == received[:2]
    for sent, got in zip(VALUES[2:], received[2:], strict=True):
        assert (sent.shape, sent.dtype) == (got.shape, got.dtype)
        assert bytes_of(sent) == bytes_of(got)
    assert [(1, 4), (1, 12, 4)] == [received[i].stride() for i in (2, 4)] == [VALUES[i].stride() for i in (2, 4)]


def test_a_layer_comes_through_as_a_layer():
    layer = nn.Linear(3, 2).requires_grad_(False)

    got = together(lambda group: group.first(lambda: layer), 3)[2]

    assert got is not layer and isinstance(got.weight, nn.Parameter) and not got.weight.requires_grad
    assert torch.equal(layer.weight, got.weight) and torch.equal(layer.bias, got.bias)


def test_each_job_is_run_once_by_its_owner_and_all_get_all_results_in_order():
    ran = []

    def work(group):
        def job(number):
            ran.append((number, group.rank))
            return 10 * number

        return list(group.run([1, 0, 1, 2], [lambda number=number: job(number) for number in range(4)]))

    assert [[0, 10, 20, 30]] * 3 == together(work, 3)
    assert [(0, 1), (1, 0), (2, 1), (3, 2)] == sorted(ran)


def test_an_error_of_one_reaches_all_in_the_same_words():
    def fails(group):
        def job():
            raise LayerError("layer 3: too small")

        return list(group.run([1], [job]))

    assert ["layer 3: too small"] * 3 == [str(error) for error in together(fails, 3) if isinstance(error, LayerError)]


def test_what_one_cannot_do_stops_all_and_names_it():
    def work(group):
        def open_base():
            if group.rank == 1:
                raise CompressionError("no such folder")

        return group.each(open_base)

    assert ["process 1 of 3 cannot take part: no such folder"] * 3 == list(map(str, together(work, 3)))


def test_processes_that_differ_are_told_in_what():
    errors = together(lambda group: group.check_same({"recipe": "nf4", "threads": group.rank}), 2)

    assert all(isinstance(error, WorkerError) for error in errors)
    assert "processes 0 and 1 differ in threads: 0 and 1; start all with the same command" in str(errors[0])


@pytest.mark.parametrize(("recipes", "difference"), [
    (("rtn(group_size=8)", "rtn(group_size=8,bits=3)"), "recipe: 'rtn"), (("slicegpt", "slicegpt"), None),
])  # fmt: skip
def test_recipes_that_cannot_be_shared_are_refused_before_anything_starts(recipes, difference, tmp_path):
    transformers_model("LlamaForCausalLM").save_pretrained(tmp_path)

    def work(group):
        return compression.compress(str(tmp_path), recipes[group.rank], calibration="random", workers=group)

    first = together(work, 2)[0]

    if difference is None:
        assert isinstance(first, RecipeError) and "works on the whole model at once; start one process" in str(first)
    else:
        assert isinstance(first, WorkerError) and f"differ in {difference}" in str(first)


def test_without_torchrun_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    with joined("cpu") as (group, device):
        assert (ALONE, "cpu") == (group, device)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("variables", "device", "words"), [
    ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE='two' must be a whole number, as torchrun sets it"),
    ({"WORLD_SIZE": "2"}, "cuda:1", "--device cuda:1: each of several processes takes a device of its own"),
])  # fmt: skip
def test_what_torchrun_would_not_set_is_refused(variables, device, words, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(WorkerError, match=says(words)), joined(device):
        pass


def test_more_processes_than_cuda_devices_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    with pytest.raises(WorkerError, match=says("4 processes on this machine, and 2 CUDA devices")), joined("cuda"):
        pass
