"""The orders of methods that their papers publish, on SmolLM2: read from the committed baselines.

python benchmarks/smollm2_orders.py            # writes figures/smollm2-orders.md
python benchmarks/smollm2_orders.py --record --data FOLDER --calibration FOLDER    # measures the baselines first
"""

import argparse
import subprocess
import sys
from pathlib import Path

from bench.gate.baseline import Baseline

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "figures" / "smollm2-orders.md"
DIRECTORY, BASE, METRIC = ROOT / "baselines", "smollm2", "quality.perplexity"
THREE, TWO, TEXT = "bits=3,group_size=64", "bits=2,group_size=64", "samples=32"
GPTQ, AWQ, WANDA, SPARSEGPT = f"gptq({THREE},{TEXT})", f"awq({THREE},{TEXT})", f"wanda({TEXT})", f"sparsegpt({TEXT})"
WANDA_OF_4, SPARSEGPT_OF_4 = f"wanda(pattern=2:4,{TEXT})", f"sparsegpt(pattern=2:4,{TEXT})"
RECIPES = (
    "fp16", "nf4", "rtn(group_size=64)", f"rtn({THREE})", GPTQ, AWQ, f"rtn({TWO})",
    "magnitude", WANDA, SPARSEGPT, WANDA_OF_4, SPARSEGPT_OF_4,
)  # fmt: skip
# the first is below the second by a factor of at least the third
ORDERS = (
    (GPTQ, f"rtn({THREE})", 1.0),
    (AWQ, f"rtn({THREE})", 1.0),
    (WANDA, "magnitude", 3.0),
    (SPARSEGPT, "magnitude", 3.0),
    (WANDA, WANDA_OF_4, 1.0),
    (SPARSEGPT, SPARSEGPT_OF_4, 1.0),
    (f"rtn({THREE})", f"rtn({TWO})", 100.0),
)


def perplexities(directory: Path = DIRECTORY) -> dict[str, float]:
    """By recipe, as recorded."""
    found = {}
    for recipe in RECIPES:
        baseline = Baseline.find(directory, BASE, recipe)
        if baseline is not None:
            (section,) = baseline.sections.values()
            found[recipe] = next(entry.value for key, entry in section.rows.items() if key.startswith(METRIC))
    return found


def broken(found: dict[str, float]) -> list[str]:
    """Orders that do not hold, in words."""
    return [
        f"{better} {found[better]:.4g} is not below {worse} {found[worse]:.4g} by a factor of {factor:g}"
        for better, worse, factor in ORDERS
        if not found[better] * factor < found[worse]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="measure, and record the baselines")
    parser.add_argument("--data")
    parser.add_argument("--calibration")
    options = parser.parse_args()
    if options.record:
        run = [sys.executable, "-m", "pytest", "bench", "-k", "test_perplexity", "--base", BASE, "--data", options.data,
               "--calibration", options.calibration, "--samples", "8", "--compute-dtype", "float32",
               "--model", ",".join(RECIPES), "--update-baselines"]  # fmt: skip
        subprocess.run(run, check=True, cwd=ROOT)
    lines = [
        "# SmolLM2: published orders",
        "",
        "## Perplexity by method",
        "",
        "Perplexity over 8 windows of 512 tokens of tokenised WikiText-2.",
        "",
        "Measured by `python benchmarks/smollm2_orders.py --record --data FOLDER --calibration FOLDER`.",
        "",
        "| recipe | perplexity |",
        "| :--- | ---: |",
        *(f"| `{recipe}` | {value:.4g} |" if value < 1e5 else f"| `{recipe}` | {value:.2e} |"
          for recipe, value in perplexities().items()),
    ]  # fmt: skip
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
