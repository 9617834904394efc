"""What a teacher is worth: the reference distilled, beside the same training on the labels alone.

    python benchmarks/against_labels.py [--recipe "kd(samples=200)"] [--seeds 3]

For each seed (of the choice and order of the texts) the perplexity of the test split, before and after, and the mean
and spread over the seeds; the difference of both is paired by seed. The recipe's last step is the one that distils.
"""

import argparse
import dataclasses
import statistics

import compression
from bench.data.sources import open_data
from bench.measure.perplexity import perplexity
from bench.measure.perplexity_windows import PerplexityProtocol
from compression import Recipe, Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="kd(samples=200)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=100, help="windows of 512 tokens")
    options = parser.parse_args()
    base, data = compression.open_base("reference"), open_data("embedded", base="reference")
    recipe = Recipe.parse(options.recipe)
    *before, last = recipe.steps
    alone = Recipe((*before, Step(dataclasses.replace(last.method, alpha=0.0))))
    protocol = PerplexityProtocol(samples=options.samples)

    def of(recipe: Recipe, seed: int) -> float:
        model = compression.compress(base, recipe, seed=seed).model
        return perplexity(model, base.tokenizer, data, protocol, device=base.device).perplexity

    print(f"perplexity {of(Recipe(tuple(before)), 0):.4f} before")
    found: dict[str, list[float]] = {recipe.text: [], alone.text: []}
    for seed in range(options.seeds):
        for each in (recipe, alone):
            found[each.text].append(of(each, seed))
            print(f"seed {seed}, {each}: {found[each.text][-1]:.4f}", flush=True)
    pairs = [taught - untaught for taught, untaught in zip(*found.values(), strict=True)]
    for text, values in [*found.items(), ("difference", pairs)]:
        print(f"{text}: {statistics.mean(values):.4f}, standard deviation {statistics.stdev(values):.4f}")


if __name__ == "__main__":
    main()
