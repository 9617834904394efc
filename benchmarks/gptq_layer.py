"""GPTQ of one linear layer beside the obvious route, in one run.

    python benchmarks/gptq_layer.py [--inputs 4096] [--outputs 4096] [--samples 128] [--length 512] [--threads 2]

Hessian: the part above the diagonal blocks only, against the full product. Rounding: one Cholesky factor of H and
halves, against the paper's route (inverse of H by a Cholesky factor, factor of the inverse, blocks of 128 columns).
4 bits, groups of 128, symmetric, damping 0.01, fp32. Both are checked before a time is printed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from compression._grids import AffineGrid, decode, quantize
from compression._rounding import Hessian, gptq, relative_error

BLOCK = 128


def inputs(cols, samples, length):
    """Correlated inputs with channels of uneven size, sample by sample."""
    generator = torch.Generator().manual_seed(0)
    rank = max(8, cols // 8)
    mix = torch.randn(rank, cols, generator=generator) / rank**0.5
    size = torch.exp(0.5 * torch.randn(cols, generator=generator))
    for _ in range(samples):
        shared = torch.randn(length, rank, generator=generator) @ mix
        yield (shared + 0.3 * torch.randn(length, cols, generator=generator)) * size


def obvious(weight, hessian, grid, damp=0.01):
    """The paper's algorithm 1 with blocks of 128 columns, each of which is a group."""
    weight, quantized = weight.clone(), torch.empty_like(weight)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for begin in range(0, weight.shape[1], BLOCK):
        end, part = begin + BLOCK, weight[:, begin : begin + BLOCK]
        scales, zeros = grid.expand(grid.fit(part), *part.shape)
        errors = torch.empty_like(part)
        for j in range(BLOCK):
            code = (part[:, j : j + 1] / scales + zeros).round().clamp(0, 2**grid.bits - 1)
            quantized[:, begin + j] = ((code - zeros) * scales)[:, 0]
            errors[:, j] = (part[:, j] - quantized[:, begin + j]) / upper[begin + j, begin + j]
            part[:, j:] -= errors[:, j, None] * upper[begin + j, begin + j : end]
        weight[:, end:] -= errors @ upper[begin:end, end:]
    return quantized


def timed(work):
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("inputs", 4096), ("outputs", 4096), ("samples", 128), ("length", 512), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grid = AffineGrid(bits=4, group_size=BLOCK, symmetric=True)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(options.outputs, options.inputs, generator=generator) * 0.02

    summed, full, count = Hessian(options.inputs), torch.zeros(options.inputs, options.inputs), 0
    ours = theirs = 0.0
    for x in inputs(options.inputs, options.samples, options.length):
        ours += timed(lambda x=x: summed.add(x))[1]
        theirs += timed(lambda x=x: full.addmm_(x.t(), x))[1]
        count += len(x)
    hessian, seconds = timed(summed.value)
    ours += seconds
    full *= 2 / count
    assert float((hessian - full).norm() / full.norm()) < 1e-5
    print(f"Hessian {options.inputs}: {ours:.2f} s, full product {theirs:.2f} s, {theirs / ours:.2f} times as fast")

    rounds = [(timed(lambda: gptq(weight, hessian, grid)), timed(lambda: obvious(weight, hessian, grid)))
              for _ in range(3)]  # fmt: skip
    ours, theirs = (min(each[i][1] for each in rounds) for i in (0, 1))
    answers = rounds[0][0][0].decode(grid), rounds[0][1][0], decode(grid, *quantize(grid, weight))
    errors = [relative_error(weight, answer, hessian) ** 0.5 for answer in answers]
    assert errors[0] <= 1.005 * errors[1] < errors[2]
    print(f"rounding {options.outputs} x {options.inputs}: {ours:.2f} s, obvious route {theirs:.2f} s, "
          f"{theirs / ours:.2f} times as fast")  # fmt: skip
    print(f"output error {errors[0]:.4f}, obvious route {errors[1]:.4f}, nearest {errors[2]:.4f}")


if __name__ == "__main__":
    main()
