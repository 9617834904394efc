"""What recipes lose of the reference's perplexity, and how that compares with rounding to nearest on the same grid.

    python benchmarks/against_rtn.py "gptq(bits=3)" "awq(bits=3,symmetric=true)"

For each recipe: the mean loss (nat per token) over windows of 512 tokens of the test split, less that of the base, and
less that of `rtn` with the same bits, group size and symmetry; intervals are 95 %, of the windows' paired differences.
Calibration is the default of the recipe, from the training split.
"""

import argparse
import copy
import math
import sys

import torch

import compression
from bench.reference import world

LENGTH = 512


def losses(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of every window, (windows,), in fp32; the first token is not scored."""
    found = []
    with torch.inference_mode():
        for some in windows.split(8):
            logits = model(some).logits[:, :-1].float()
            found.append(torch.nn.functional.cross_entropy(logits.mT, some[:, 1:], reduction="none").mean(1))
    return torch.cat(found)


def interval(difference: torch.Tensor) -> str:
    half = 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return f"{float(difference.mean()):+.4f} ± {half:.4f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Recipes against rounding to nearest, on the reference.")
    parser.add_argument("recipes", nargs="+", help="quantizers with bits, group_size and symmetric")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--base", default="reference", help="a model of the reference's world (default: the student)")
    options = parser.parse_args()
    base = compression.open_base(options.base)
    ids = base.tokenizer.encode("\n\n".join(world.texts("test")), add_special_tokens=False, verbose=False)
    windows = torch.tensor(ids[: options.windows * LENGTH]).view(-1, LENGTH)

    def of(recipe: str) -> torch.Tensor:
        # a copy: tensors that the recipe left alone are the base's own, and float() would change them there
        return losses(copy.deepcopy(compression.compress(base, recipe, calibration="embedded").model).float(), windows)

    dense, nearest = of("fp16"), {}
    print(f"{len(windows)} windows; fp16 {float(dense.mean()):.4f} nat per token")
    for recipe in options.recipes:
        method = compression.Recipe.parse(recipe).steps[0].method
        symmetric = str(getattr(method, "symmetric", False)).lower()
        twin = f"rtn(bits={method.bits},group_size={method.group_size},symmetric={symmetric})"
        if twin not in nearest:
            nearest[twin] = of(twin)
            print(f"{twin}: {interval(nearest[twin] - dense)}", flush=True)
        found = of(recipe)
        print(f"{recipe}: {interval(found - dense)}, against it {interval(found - nearest[twin])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
