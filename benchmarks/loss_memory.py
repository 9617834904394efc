"""What the loss of distillation takes in memory and time, beside the textbook form on whole tensors.

    python benchmarks/loss_memory.py [--vocabularies 32000,128000] [--tokens 1024] [--width 1024] [--cases head,frozen]
                                     [--rounds 3]

The loss is that of [O] (alpha 0.3, T 4) with its gradients, of 2 x 512 tokens in fp32, where

    logits     the logits of student and teacher are given; the gradient of the student's is asked for
    head       hidden states and heads are given; the gradients of the student's are asked for
    frozen     the same, without the gradient of the head, as with LoRA
    top 64     as head, the teacher given as its 64 most likely tokens and the mass of the rest; the textbook form has
               the teacher's logits given

A figure is the peak of a process of its own beyond what it held with the inputs made, by the kernel's high-water mark;
what the gradients that are asked for take is in it, and stands beside it. Before that a process computes both, and the
largest difference of a gradient, as a share of its largest value, must be at most 1e-5. Seconds (with --rounds; the
least of them) come from further processes with the usual settings of the heap; compare them on a quiet machine only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from bench.measure.memory import STEADY_HEAP
from bench.measure.memory_process import Peak, anonymous_memory
from compression.cost import give_back
from compression.numeric.losses_in_chunks import Projected, TopK
from compression.training.objective import distillation
from compression.training.settings import Objective

KD = Objective(alpha=0.3, temperature=4.0)  # of [O]
CASES = ("logits", "head", "frozen", "top 64")
ALLOWED = 1e-5  # difference of gradients, as a share of the largest

Loss = Callable[[], Tensor]


class Problem:
    """Inputs of one case; `ours` and `textbook` make the loss from them, `wanted` are the tensors to get a gradient."""

    def __init__(self, case: str, vocabulary: int, tokens: int, width: int) -> None:
        torch.manual_seed(0)
        self.labels = torch.randint(vocabulary, (tokens,))
        self.labels[::512] = -100
        if case == "logits":
            self.student, self.teacher = torch.randn(tokens, vocabulary) * 3, torch.randn(tokens, vocabulary) * 3
            self.wanted = [self.student.requires_grad_()]
            self.whole = lambda: (self.student, self.teacher)
            return
        hidden, head, theirs, their_head = (torch.randn(n, width) for n in (tokens, vocabulary, tokens, vocabulary))
        head.mul_(3 / width**0.5), their_head.mul_(3 / width**0.5)
        self.student, self.teacher = Projected(hidden, head), Projected(theirs, their_head)
        self.wanted = [hidden.requires_grad_()] + ([] if case == "frozen" else [head.requires_grad_()])
        self.whole = lambda: (hidden @ head.T, theirs @ their_head.T)
        if case == "top 64":
            logits = theirs @ their_head.T
            parts = [TopK.of(some, 64) for some in logits.split(32)]
            columns = (
                torch.cat(column) for column in zip(*((p.ids, p.log_probs, p.log_tail) for p in parts), strict=True)
            )
            self.teacher = TopK(*columns, vocabulary)
            self.whole = lambda: (hidden @ head.T, logits)

    def ours(self) -> Tensor:
        return distillation(self.student, self.teacher, self.labels, KD).total

    def textbook(self) -> Tensor:
        """The form of [E] listing 7 and of most code, with padding left out and the mean over tokens."""
        z, t = (each[self.labels != -100] for each in self.whole())
        log_q, p = functional.log_softmax(z / KD.temperature, -1), functional.softmax(t.detach() / KD.temperature, -1)
        divergence = functional.kl_div(log_q, p, reduction="batchmean") * KD.temperature**2
        return (1 - KD.alpha) * functional.cross_entropy(z, self.labels[self.labels != -100]) + KD.alpha * divergence


def difference(problem: Problem) -> float:
    """The largest difference of a gradient between both forms, as a share of its largest value."""
    both = [torch.autograd.grad(loss(), problem.wanted) for loss in (problem.ours, problem.textbook)]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(*both, strict=True))


def peak_bytes(problem: Problem, loss: Loss) -> int:
    read, _ = anonymous_memory()
    give_back()
    before = read()
    with Peak(read) as peak:
        torch.autograd.grad(loss(), problem.wanted)
    return peak.bytes - before


def seconds(problem: Problem, loss: Loss, rounds: int) -> float:
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        torch.autograd.grad(loss(), problem.wanted)
        found.append(time.perf_counter() - begin)
    return min(found)


def child(what: str, form: str, case: str, vocabulary: int, options: argparse.Namespace) -> float:
    """One figure from a process of its own.

    Raises:
        RuntimeError: it failed; most likely it was killed because memory ran out.
    """
    spec = {"what": what, "form": form, "case": case, "vocabulary": vocabulary, "tokens": options.tokens,
            "width": options.width, "rounds": options.rounds, "threads": options.threads}  # fmt: skip
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    heap = STEADY_HEAP if what == "peak" else {}
    command = [sys.executable, __file__, "--child", json.dumps(spec)]
    done = subprocess.run(command, env=os.environ | heap | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{what} of {form}, {case}, {vocabulary}: exit status {done.returncode}: {done.stderr[-500:]}"
        )
    return float(done.stdout)


def answer(spec: dict[str, int | str]) -> float:
    """What a child process prints."""
    torch.set_num_threads(spec["threads"])
    warm = Problem(spec["case"], 100, 8, 8)
    difference(warm)  # libraries take what they keep
    problem = Problem(spec["case"], spec["vocabulary"], spec["tokens"], spec["width"])
    if spec["what"] == "difference":
        return difference(problem)
    loss = getattr(problem, spec["form"])
    return peak_bytes(problem, loss) if spec["what"] == "peak" else seconds(problem, loss, spec["rounds"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and time of the loss of distillation.")
    parser.add_argument("--vocabularies", default="32000,128000")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024, help="of the hidden states")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=0, help="timed runs of each; 0: memory alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.cases.split(",")) - {*CASES}:
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if options.child:
        print(answer(json.loads(options.child)))
        return 0
    timed = "; s, theirs / ours" if options.rounds else ""
    print(f"{options.tokens} tokens, width {options.width}; MiB, theirs / ours{timed}")
    worst = 0.0
    for vocabulary in map(int, options.vocabularies.split(",")):
        for case in options.cases.split(","):
            if case != "top 64":
                worst = max(worst, off := child("difference", "both", case, vocabulary, options))
                if not off <= ALLOWED:
                    print(f"{case}, {vocabulary}: gradients differ by {off:.1e}, more than {ALLOWED}")
                    return 1
            ours, theirs = (child("peak", form, case, vocabulary, options) for form in ("ours", "textbook"))
            rows = {"logits": options.tokens * vocabulary, "frozen": options.tokens * options.width}
            asked = 4 * rows.get(case, (options.tokens + vocabulary) * options.width)
            line = (f"{vocabulary:7} {case:7} ours {ours / 2**20:7.1f} textbook {theirs / 2**20:7.1f} "
                    f"gradients alone {asked / 2**20:6.1f}: {theirs / ours:.2f}")  # fmt: skip
            if options.rounds:
                fast, slow = (child("seconds", form, case, vocabulary, options) for form in ("ours", "textbook"))
                line += f"; {fast:.2f} {slow:.2f}: {slow / fast:.2f}"
            print(line, flush=True)
    print(f"largest difference of a gradient {worst:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
