"""AWQ of a small model by phases, and its search beside the obvious one, in one run.

    python benchmarks/awq_model.py [--layers 4] [--hidden 512] [--samples 128] [--length 512] [--threads 2]

The model has random weights and reads random tokens; 4 bits, groups of 128, zero points, 20 ratios, clipping. `forward`
is what calibration costs whatever the method: every block is run over the text twice, uncompressed and compressed.
The obvious search runs the layers over all tokens for every ratio; that it finds the same scales is checked before a
time is printed. Times are processor seconds of the process beside the clock's: on a shared machine the clock tells more
of the others.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import compression
from compression.architectures.random_shapes import SHAPES
from compression.calibration import capture, observers
from compression.numeric import channel_scales
from compression.numeric.grids import AffineGrid
from compression.numeric.grouping import decode, quantize

PHASES = {
    "Hessians": (observers.Hessian, "add"),
    "forward": (capture.Inputs, "observe"),
    "forward (compressed)": (capture.Inputs, "advance"),
    "search of scales": (channel_scales.AwqScales, "search"),
    "search of clipping": (channel_scales, "clipped"),
}


class Phases:
    """Wall and processor seconds by phase; what is called within another phase is not counted to that."""

    def __init__(self):
        self.seconds, self.running = defaultdict(lambda: [0.0, 0.0]), []
        for name, (owner, attribute) in PHASES.items():
            setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))

    def timed(self, name, work):
        def run(*arguments, **options):
            begin, within = (time.perf_counter(), time.process_time()), [0.0, 0.0]
            self.running.append(within)
            try:
                return work(*arguments, **options)
            finally:
                took = time.perf_counter() - begin[0], time.process_time() - begin[1]
                self.running.pop()
                for i in (0, 1):
                    self.seconds[name][i] += took[i] - within[i]
                    if self.running:
                        self.running[-1][i] += took[i]

        return run


def model(layers, hidden):
    """A base of random weights, as the recipe `awq` gets it."""
    SHAPES["awq-model"] = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32", "tie_word_embeddings": False,
        "hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "vocab_size": 256,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return compression.open_base("random:awq-model")


def obvious(readers, x, candidates):
    """The scales of the least error, each ratio by a forward pass of the layers over all tokens."""
    best, least = None, torch.inf
    wanted = [x @ weight.t() for weight, _ in readers]
    for _, scales in candidates:
        error = 0.0
        for (weight, grid), y in zip(readers, wanted, strict=True):
            answer = decode(grid, *quantize(grid, weight * scales)) / scales
            error += float((x @ answer.t() - y).square().sum() / y.square().sum())
        if error < least:
            best, least = scales, error
    return best


def timed(work):
    begin = time.process_time()
    return work(), time.process_time() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("layers", 4), ("hidden", 512), ("samples", 128), ("length", 512), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    generator, cols = torch.Generator().manual_seed(0), options.hidden
    grid = AffineGrid(bits=4, group_size=128, symmetric=False)
    readers = [(torch.randn(11 * cols // 4, cols, generator=generator) * 0.02, grid) for _ in range(2)]
    x = torch.randn(options.samples * options.length, cols, generator=generator)
    x *= torch.randn(cols, generator=generator).exp()
    hessian = 2 * x.t() @ x / len(x)
    producer = channel_scales.Producer(torch.arange(cols), None)
    (_, ours), seconds = timed(
        lambda: channel_scales.AwqScales(20, False).search(readers, hessian, producer, torch.float32)
    )
    candidates = list(channel_scales.candidates(hessian.diagonal().sqrt(), 20))
    theirs, longer = timed(lambda: obvious(readers, x, candidates))
    torch.testing.assert_close(ours, theirs)
    print(f"scales of gate and up: {seconds:.2f} s, by forward passes {longer:.2f} s, {longer / seconds:.0f} times as "
          "fast")  # fmt: skip

    base, phases = model(options.layers, options.hidden), Phases()
    recipe = f"awq(samples={options.samples},sequence_length={options.length})"
    whole = phases.timed("whole", lambda: compression.compress(base, recipe))
    result = whole()
    spent = phases.seconds.pop("whole")  # what no phase holds: rounding, packing, error of the report
    for name, (wall, busy) in [*phases.seconds.items(), ("rest", spent)]:
        print(f"{name:22s} {wall:7.2f} s {busy:7.2f} s of processor")
    total = [sum(part) for part in zip(spent, *phases.seconds.values(), strict=True)]
    print(f"{'awq':22s} {total[0]:7.2f} s {total[1]:7.2f} s of processor, "
          f"{result.cost.calibration_tokens} tokens")  # fmt: skip


if __name__ == "__main__":
    main()
