"""Real processes that share a run: they come to the bytes of one; one of them is killed, and any number goes on."""

import os
import signal
import socket
import sys
from contextlib import ExitStack

import pytest
from block_by_block import BLOCKS, GPTQ, STATE, deep_checkpoint, same, tensors
from processes import HELPERS, completed, environment, running, wait_until

from compression.__main__ import main

SETTINGS = "samples=9,sequence_length=64"
RECIPES = [f"gptq({SETTINGS})", f"awq({SETTINGS})", f"sparsegpt({SETTINGS})"]
ONE_THREAD = {"OMP_NUM_THREADS": 1}


def torchrun(count, *command, **variables):
    """A run of `count` processes on this machine, one thread each."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    return completed([*start, *command], env=environment(**ONE_THREAD, **variables))


def command(base, out, recipe=GPTQ):
    return ["-m", "compression", recipe, "--base", base, "--calibration", "random", "--device", "cpu", "--out", out]


def free_port():
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]


def ranks(held, count, arguments):
    """Processes that nobody watches, as another launcher than torchrun would start them; errors are piped."""
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return [held.enter_context(running([sys.executable, *map(str, arguments)], text=True, stderr=-1, stdout=-3,
                                       env=environment(**ONE_THREAD, **where, RANK=rank, LOCAL_RANK=rank)))
            for rank in range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return deep_checkpoint(tmp_path_factory.mktemp("base") / "deep")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    completed([sys.executable, *command(base, folder)], env=environment(**ONE_THREAD), check=True)
    return folder


def test_one_two_and_four_processes_come_to_the_same_bytes_on_the_reference(tmp_path):
    for count in (1, 2, 4):
        done = torchrun(count, HELPERS / "shared_run.py", tmp_path / str(count), *RECIPES)
        assert 0 == done.returncode, done.stderr[-3000:]

    for number, _ in enumerate(RECIPES):
        one = tensors(tmp_path / "1" / str(number))
        assert len(one) > 70
        assert all(same(one, tensors(tmp_path / count / str(number))) for count in ("2", "4"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_is_named_by_the_other_and_any_number_goes_on(victim, base, whole, tmp_path):
    out, shards = tmp_path / "out", "model-0000[2-9]*"
    many = GPTQ.replace("samples=4", "samples=400")
    with ExitStack() as held:
        children = ranks(held, 2, command(base, out, many))
        wait_until(lambda: out.is_dir() and list(out.glob(shards)), children[0])
        children[victim].send_signal(signal.SIGKILL)
        _, said = children[1 - victim].communicate()

    assert 2 == children[1 - victim].returncode
    assert f"error: process {victim} of 2 is gone" in said and "the same command, with any number" in said
    assert (out / STATE).exists() and 0 < len(list(out.glob(shards))) < BLOCKS
    done = torchrun(3, *command(base, out, many))
    assert 0 == done.returncode, done.stderr[-3000:]
    assert f"{out} is not finished" in done.stderr
    again = tmp_path / "again"
    assert 0 == torchrun(1, *command(base, again, many)).returncode
    assert same(tensors(again), tensors(out))


def test_two_processes_write_the_folder_of_one_and_report_it_once(base, whole, tmp_path):
    out = tmp_path / "out"

    done = torchrun(2, *command(base, out))

    assert 0 == done.returncode, done.stderr[-3000:]
    assert same(tensors(whole), tensors(out)) and 1 == done.stdout.count("kernels:")


def test_processes_of_another_number_of_threads_are_refused_and_nothing_is_written(base, tmp_path):
    code = "import os, torch; torch.set_num_threads(1 + int(os.environ['RANK'])); "
    code += "import sys; from compression.__main__ import main; sys.exit(main())"

    with ExitStack() as held:
        children = ranks(held, 2, ["-c", code, *command(base, tmp_path / "out")[2:]])
        said = [child.communicate()[1] for child in children]

    assert [2, 2] == [child.returncode for child in children]
    assert "processes 0 and 1 differ in the number of threads (OMP_NUM_THREADS): 1 and 2" in said[0]
    assert not (tmp_path / "out").exists()


def test_what_is_not_shared_out_is_refused_before_the_processes_meet(capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")

    assert 2 == main(["list"])
    assert "python -m compression list is not shared out; start one process" in capsys.readouterr().err
