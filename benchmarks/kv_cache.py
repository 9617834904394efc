"""What a quantized cache costs in loss, and what it holds: every recipe against its base, paired by window.

python benchmarks/kv_cache.py                                                # writes figures/kv-cache-reference.md
python benchmarks/kv_cache.py --base smollm2 --data FOLDER --windows 4       # which holds wikitext-2/

Losses are those of generation (`compression.caches.replaying`): every token is predicted behind what the cache would
hold by then. Bytes are those of all tensors of the cache after one window, beside those of keys and values in 16 bits.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import compression
from bench.data.sources import open_data
from bench.measure.perplexity import perplexity
from bench.measure.perplexity_windows import PerplexityProtocol
from compression.architectures.decoder import Decoder

FOLDER = Path(__file__).parent / "figures"
RECIPES = (
    "kv_int(bits=8)", "kv_fp8", "kv_int(bits=4)", "kv_int(bits=4,keys=channel)",
    "kv_int(bits=3)", "kv_int(bits=3,keys=channel)", "kv_int(bits=2)", "kv_int(bits=2,keys=channel)",
    "kv_int(bits=2,keys=channel,residual=1)", "kivi(bits=4)", "kivi",
)  # fmt: skip


def share_of_bytes(result: Any, tokens: int) -> float:
    """Bytes of a cache of so many tokens, as a share of keys and values in 16 bits."""
    model, cache = result.model, result.cache_factory()
    with torch.inference_mode():
        model(input_ids=torch.arange(tokens)[None] % model.config.vocab_size, past_key_values=cache, logits_to_keep=1)
    blocks = Decoder(model).blocks
    return cache.nbytes / sum(2 * 2 * block.heads[1] * block.head_size * tokens for block in blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="reference")
    parser.add_argument("--data")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    options = parser.parse_args()
    base, data = compression.open_base(options.base), open_data(options.data, base=options.base)
    protocol = PerplexityProtocol(samples=options.windows, length=options.length)

    def read(model: Any) -> Any:
        return perplexity(model, base.tokenizer, data, protocol, device="cpu")

    plain = read(base.model)
    print(f"base {plain.mean_nll:.4f} nat", flush=True)
    lines = []
    for recipe in options.recipes:
        result = compression.compress(base, recipe)
        reading = read(result.model)
        lost = torch.tensor(reading.sample_means, dtype=torch.float64) - torch.tensor(plain.sample_means)
        error = 1.96 * float(lost.std()) / len(lost) ** 0.5
        share = share_of_bytes(result, options.length)
        lines.append(f"| `{recipe}` | {float(lost.mean()):+.4f} | ± {error:.4f} | {reading.perplexity:.4g} | "
                     f"{share:.3f} |")  # fmt: skip
        print(lines[-1], flush=True)
    command = f"python benchmarks/kv_cache.py --base {options.base}" + (" --data FOLDER" if options.data else "")
    text = [
        "# The KV cache", "", f"## {options.base}", "",
        f"{options.windows} windows of {options.length} tokens of {data.name}; the base has {plain.mean_nll:.4f} nat "
        f"per token, perplexity {plain.perplexity:.4g}.", "",
        f"Measured by `{command} --windows {options.windows} --length {options.length}`.", "",
        "| recipe | loss (nat) | 95 % | perplexity | cache / 16 bits |",
        "| :--- | ---: | ---: | ---: | ---: |", *lines,
    ]  # fmt: skip
    (FOLDER / f"kv-cache-{options.base}.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
