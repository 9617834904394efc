"""What is said of a cluster before anything starts there: addresses, room, and what is unlike this machine."""

import json
import os
import socket
import sys

import pytest
from checkpoints import says
from hypothesis import given
from hypothesis import strategies as st

from compression.__main__ import main
from compression.cluster import facts, ray
from compression.cluster.ray import Needs, Node, address_of, at_once, check_fits, connected, differing, environment
from compression.errors import ClusterError

NEEDS = st.builds(Needs, st.integers(1, 4), st.integers(0, 2), st.integers(0, 2**34))
NODES = st.lists(st.builds(Node, st.just("n" * 56), st.sampled_from(["10.0.0.1", "10.0.0.2"]), NEEDS), max_size=4)


@given(st.dictionaries(st.sampled_from(["fp16", "nf4", "rtn"]), NEEDS, min_size=1), NODES)
def test_a_recipe_is_refused_if_and_only_if_no_node_has_room(needs, nodes):
    def has_room(need):
        return any(all(has >= n for has, n in zip(node.has, need, strict=True)) for node in nodes)

    if nodes and all(map(has_room, needs.values())):
        check_fits(needs, nodes)
    else:
        with pytest.raises(ClusterError):
            check_fits(needs, nodes)


def test_what_is_missing_is_said_of_the_nearest_node():
    nodes = [Node("a" * 56, "10.0.0.1", Needs(2, 0, 2**33)), Node("b" * 56, "10.0.0.2", Needs(1, 1, 2**32))]

    with pytest.raises(ClusterError, match=says("gptq needs 2 CPUs, 1 GPU and 4.00 GiB", "the nearest, aaaaaaaa, has",
                                                "missing: 1 GPU. Start")):  # fmt: skip
        check_fits({"gptq": Needs(2, 1, 2**32)}, nodes)
    with pytest.raises(ClusterError, match=says("no node takes tasks")):
        check_fits({"gptq": Needs(2, 1, 2**32)}, [])


@pytest.mark.parametrize(
    ("cpus", "machines", "recipes", "expected"),
    [(1, ["a"], 6, 2), (2, ["a"], 6, 1), (1, ["a", "a"], 6, 4), (1, ["a", "b"], 6, 2), (1, ["a"], 1, 1), (1, [], 3, 0)],
)
def test_recipes_share_a_machine_if_it_has_room_for_several(cpus, machines, recipes, expected):
    nodes = [Node(str(i), machine, Needs(2, 0, 2**33)) for i, machine in enumerate(machines)]

    assert expected == at_once({str(i): Needs(cpus, 0, 1) for i in range(recipes)}, nodes)


@pytest.mark.parametrize("text", ["here", "10.0.0.1", "ray://10.0.0.1:10001", "bench/test_quality.py", "a:b"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ClusterError, match=says("must be auto or the HOST:PORT of a cluster", text)):
        address_of(text)


def test_auto_is_the_cluster_of_the_variable_else_one_of_this_run(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert None is address_of("auto")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "10.0.0.1:6379" == address_of("auto")
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:1")
    with pytest.raises(ClusterError, match=says("($RAY_ADDRESS)")):
        address_of("auto")


def test_a_missing_library_and_a_cluster_that_does_not_answer_are_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=says("--ray needs Ray", "pip install", "[ray]")), connected("auto"):
        pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=says(f"no cluster answers at {address}", "ray start --head")):
            ray._check_answers(address)


def test_the_command_refuses_ray_where_it_compresses_nothing_and_without_the_library(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert 2 == main(["list", "--ray", "auto"])
    assert "--ray belongs to compressing" in capsys.readouterr().err
    assert 2 == main(["nf4", "--out", str(tmp_path / "out"), "--ray", "auto"])
    assert "--ray needs Ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_same_machine_is_alike_and_another_disk_base_or_version_is_not(tmp_path, monkeypatch):
    with ray.token_in(tmp_path) as token:
        asked = {"base": "reference", "paths": [str(tmp_path), "/no/such"], "token": token}
        here = facts.facts(asked)
        assert [] == differing(here, json.loads(json.dumps(facts.facts(asked))))
    elsewhere = facts.facts(asked)  # where the token is not seen
    monkeypatch.setattr(facts, "_version", lambda name: "0.1")
    words = "; ".join(differing(here, facts.facts(asked | {"base": "reference-teacher"})))

    assert [f"folder {tmp_path} is not the same disk, or read-only there and shared here"] == differing(here, elsewhere)
    assert "torch is 0.1 there and " in words
    assert "base reference is None there" in words


def test_a_key_is_not_sent_and_settings_are(monkeypatch):
    monkeypatch.setenv("BENCH_JUDGE_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("BENCH_DATA", "/data")
    sent = environment(OMP_NUM_THREADS="3")

    assert "secret" not in sent.values()
    assert ("/data", "3") == (sent["BENCH_DATA"], sent["OMP_NUM_THREADS"])
    assert "compression" in os.listdir(sent["PYTHONPATH"].split(os.pathsep)[0])
