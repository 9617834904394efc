"""How much rounding costs SmolLM2 on the 4-bit grids that it is shipped on, and off them.

python benchmarks/smollm2_grids.py --data FOLDER    # which holds wikitext-2/; writes figures/smollm2.md

`smollm2-raw` is what the package ships; `smollm2` is the same function with its weights moved off the grids
(`compression.checkpoints.smollm2`). Perplexity over disjoint windows of 512 tokens. The grids have real offsets, which
`hqq` has too; `rtn` has whole ones.
"""

import argparse
from pathlib import Path

import compression
from bench.data.sources import open_data
from bench.measure.perplexity import perplexity
from bench.measure.perplexity_windows import PerplexityProtocol

FILE = Path(__file__).parent / "figures" / "smollm2.md"
RECIPES = ("fp16", "hqq(group_size=32)", *(f"rtn(bits={bits},group_size=32)" for bits in (4, 3, 2)))
BASES = ("smollm2-raw", "smollm2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    found: dict[str, list[str]] = {recipe: [] for recipe in RECIPES}
    for name in BASES:
        base = compression.open_base(name)
        data = open_data(options.data, base=name)
        protocol = PerplexityProtocol(samples=options.windows)
        for recipe in RECIPES:
            model = compression.compress(base, recipe).model
            value = perplexity(model, base.tokenizer, data, protocol, device="cpu").perplexity
            found[recipe].append(f"{value:.4g}" if value < 1e5 else f"{value:.2e}")
            print(name, recipe, found[recipe][-1], flush=True)
    lines = [
        "# SmolLM2",
        "",
        "## Rounding on and off the grids",
        "",
        f"Perplexity over {options.windows} windows of 512 tokens of {data.name}.",
        "",
        "Measured by `python benchmarks/smollm2_grids.py --data FOLDER`.",
        "",
        f"| recipe | {' | '.join(f'`{name}`' for name in BASES)} |",
        "| :--- | ---: | ---: |",
        *(f"| `{recipe}` | {' | '.join(values)} |" for recipe, values in found.items()),
    ]
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
