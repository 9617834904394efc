"""How fast the compiled 4-bit kernel is, beside what core torch has for the same layer.

    python benchmarks/native_lut4.py [--threads 1] [--rounds 5] [--quick]

Every product streams: it cycles over matrices of more than 200 MB together (as stored: few in bf16, many in 4 bits),
as decoding does over the layers of a model. The contenders take turns within each round; a cell is the median over
rounds of (time of the other / time of ours) in the same round: above 1 ours is faster. It is verified, then timed.
With one thread the clock is the processor time of this process, which others disturb less; else it is the wall's.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compression.layers.kernels import lut4

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632), (4096, 4096))  # N, K
STREAMED = 210 * 2**20  # bytes: several times any last-level cache
GROUP = 128
INTEGERS = torch.arange(16.0)
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
)


Contender = tuple[Callable[[Any], Tensor], Sequence[Any]]  # a product, and the forms of the weight that it cycles over


class Layer:
    """One matrix in every form, each copied until it is large enough to be streamed."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k = n, k
        self.codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        self.scales = torch.rand(n, k // GROUP) / 100
        self.zeros = torch.full_like(self.scales, 8.0)
        weight = ((self.codes - 8.0).view(n, -1, GROUP) * self.scales[..., None]).view(n, k)
        self.weight = weight
        self.fp32 = self.copies(weight)
        self.bf16 = self.copies(weight.bfloat16())
        self.packed = self.copies(lut4.pack(self.codes))
        self.int4 = self.copies(torch._convert_weight_to_int4pack_for_cpu(self.codes.int(), 1))
        self.scales_and_zeros = (
            torch.stack([self.scales.T, torch.zeros_like(self.scales.T)], -1).bfloat16().contiguous()
        )

    @staticmethod
    def copies(matrix: Tensor) -> list[Tensor]:
        return [matrix.clone() for _ in range(-(-STREAMED // matrix.nbytes))]

    def contenders(self, m: int) -> dict[str, Contender]:
        x = torch.randn(m, self.k)
        half = x.bfloat16()

        def ours(table: Tensor, zeros: Tensor | None) -> list[Callable[[Tensor], Tensor]]:
            return [lut4.bind(w, table, self.scales.clone(), zeros, GROUP) for w in self.packed]

        def torch_int4(w: Tensor) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(half, w, GROUP, self.scales_and_zeros)

        torch.testing.assert_close(ours(INTEGERS, self.zeros)[0](x), x @ self.weight.T, rtol=1e-3, atol=1e-3)
        return {
            "ours int4": (lambda product: product(half), ours(INTEGERS, self.zeros)),
            "ours nf4": (lambda product: product(half), ours(NF4, None)),
            "bf16": (lambda w: torch.nn.functional.linear(half, w), self.bf16),
            "fp32": (lambda w: torch.nn.functional.linear(x, w), self.fp32),
            "torch int4": (torch_int4, self.int4),
        }

    def dequantize_and_multiply(self, m: int, table: Tensor) -> Callable[[Tensor], Tensor]:
        x = torch.randn(m, self.k)

        def product(w: Tensor) -> Tensor:
            levels = table[lut4.unpack(w, self.k).int()].view(self.n, -1, GROUP)
            return x @ levels.mul_(self.scales[..., None]).view(self.n, self.k).T

        return product


def seconds(product: Callable[[Any], Tensor], weights: Sequence[Any]) -> float:
    """Per product, over one pass through the weights."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for weight in weights:
        product(weight)
    return (clock() - start) / len(weights)


def interleaved(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    for product, weights in contenders.values():
        product(weights[0])
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (product, weights) in contenders.items():
            times[name].append(seconds(product, weights))
    return times


def ratio(times: dict[str, list[float]], other: str, ours: str) -> float:
    return statistics.median(a / b for a, b in zip(times[other], times[ours], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the last shape only, without many rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if not lut4.available():
        raise SystemExit(f"no native kernel: {lut4.reason()}")

    print(
        f"threads {args.threads}, groups of {GROUP}; x and results bf16 but for fp32; ratios: time of the other / ours"
    )
    heads = [f"{other}/{ours[5:]}" for ours in ("ours int4", "ours nf4") for other in ("bf16", "fp32", "torch int4")]
    print(f"{'N x K':>11} {'M':>3} {'int4 ms':>8} {'nf4 ms':>8}  " + " ".join(f"{head:>15}" for head in heads))
    with torch.inference_mode():
        for n, k in SHAPES[-1:] if args.quick else SHAPES:
            layer = Layer(n, k)
            for m in (1, 2, 4, 8, 16):
                times = interleaved(layer.contenders(m), args.rounds)
                cells = [
                    ratio(times, other, ours)
                    for ours in ("ours int4", "ours nf4")
                    for other in ("bf16", "fp32", "torch int4")
                ]
                milli = [1e3 * statistics.median(times[ours]) for ours in ("ours int4", "ours nf4")]
                row = f"{n:>5}x{k:<5} {m:>3} {milli[0]:8.3f} {milli[1]:8.3f}  "
                print(row + " ".join(f"{cell:15.2f}" for cell in cells), flush=True)
        if args.quick:
            return
        print("\nwhere to switch: time of dequantize-to-fp32 and sgemm / time of ours (below 1: dequantize)")
        for m in (16, 64, 128, 512):
            some, ours = layer.packed[:2], layer.contenders(m)
            times = interleaved(
                {
                    **{name: (ours[name][0], ours[name][1][:2]) for name in ("ours int4", "ours nf4")},
                    "dequantize int4": (layer.dequantize_and_multiply(m, INTEGERS - 8), some),
                    "dequantize nf4": (layer.dequantize_and_multiply(m, NF4), some),
                },
                min(args.rounds, 3),
            )
            cells = [ratio(times, f"dequantize {kind}", f"ours {kind}") for kind in ("int4", "nf4")]
            print(f"{n:>5}x{k:<5} {m:>3} rows: int4 {cells[0]:6.2f}  nf4 {cells[1]:6.2f}", flush=True)


if __name__ == "__main__":
    main()
