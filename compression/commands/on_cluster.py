"""`--ray`: the same command on a node of a Ray cluster that has room for it; the folder is on a disk of both."""

import argparse
import os
import sys
from collections.abc import Sequence

import psutil

import compression
from compression.cluster import facts, node
from compression.cluster.ray import Needs, check_fits, connected, count, environment, library, token_in
from compression.errors import ClusterError
from compression.files.terminal import terminal


def compress(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run `python -m compression` with these arguments on a node; its exit status. Its output is printed at the end.

    A node needs memory for base and result, beside what this process holds. If the worker dies, Ray starts the command
    again, which goes on with the folder.

    Raises:
        CompressionError: the recipe cannot be; no cluster, no node with room, or a node that is unlike this machine.
    """
    import torch

    library(options.ray)
    plan = compression.plan(
        options.base, options.recipe, calibration=options.calibration, teacher=options.teacher,
        downstream=options.downstream,
    )  # fmt: skip
    gpu = options.device.startswith("cuda") if options.device else torch.cuda.is_available()
    if gpu and options.device not in (None, "cuda"):
        raise ClusterError(f"--device {options.device}: Ray chooses the GPU of a node; give --device cuda")
    memory = psutil.Process().memory_info().rss + plan.base_bytes + plan.stored_bytes
    needs, folder = Needs(torch.get_num_threads(), int(gpu), memory), os.getcwd()
    variables = environment(OMP_NUM_THREADS=str(needs.cpus))
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with connected(options.ray) as cluster:
        check_fits({plan.recipe.text: needs}, cluster.nodes)
        with token_in(options.out.absolute().parent) as token:
            asked = {"base": options.base, "paths": [folder], "token": token}
            cluster.check_alike(facts.__name__, asked, facts.facts(asked), variables, [needs])
        words = f"{plan.recipe}: given to a cluster of {count(len(cluster.nodes), 'node')}; it needs {needs}"
        print(terminal(words), file=sys.stderr, flush=True)
        task = cluster.task(node.complete_or_raise, plan.recipe.text, needs)
        done = cluster.get(task.remote(["-m", "compression", *without_ray(arguments)], folder, variables))
    sys.stdout.write(done["output"])
    sys.stderr.write(done["errors"])
    return int(done["status"])


def without_ray(arguments: Sequence[str]) -> list[str]:
    """The command line without `--ray ADDRESS`.

    >>> without_ray(["nf4", "--ray", "auto", "--out", "x", "--ray=10.0.0.1:6379"])
    ['nf4', '--out', 'x']
    """
    rest = iter(arguments)
    kept = []
    for word in rest:
        if word == "--ray":
            next(rest, None)
        elif not word.startswith("--ray="):
            kept.append(word)
    return kept
