"""Write the model cards of the embedded reference: `python -m bench.commands.card_of_reference [--name student]`.

Every figure in `student/card.json`, `teacher/card.json` and the table in README.md comes from here: scores on the test
items with their intervals, the facts of the training, hashes, and how far weights and activations are from Gaussian.

For each decoder layer: the excess kurtosis (0 for a Gaussian) of the weights of its linear layers and of their inputs
over held-out text, the largest of the layer's linear layers each; and the largest channel ratio of the inputs, which is
the largest magnitude in any channel over the median of all channels' largest magnitudes.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import reference
from bench.measure import reference_scores
from bench.reference import NAMES, folder, world

if TYPE_CHECKING:
    import torch

WINDOWS = 8  # of 512 tokens, over which activations are taken
PUBLISHED = (
    "up to 20 times larger than in other dimensions from 6.7 B parameters on (LLM.int8(), arXiv 2208.07339)",
    "about 100 times larger than most activations (SmoothQuant, arXiv 2211.10438)",
    "excess kurtosis of activations 1818.56 in a 1.4 B model trained with Adam, 0.04 where outliers are prevented "
    "(Outlier-Safe Pre-Training, arXiv 2506.19697)",
)
TASKS = tuple(task for task in reference_scores.SCORED if task not in ("no_rag", "perplexity"))
START, END = "<!-- card -->", "<!-- end of card -->"


def kurtosis(values: "torch.Tensor") -> float:
    """Excess kurtosis of all values, 0 for a Gaussian."""
    centred = values.double().flatten() - values.double().mean()
    return float(centred.pow(4).mean() / centred.pow(2).mean().pow(2)) - 3


def channel_ratio(inputs: "torch.Tensor") -> float:
    """Largest magnitude over the median of the channels' largest magnitudes; inputs (tokens, channels)."""
    largest = inputs.abs().amax(0)
    return float(largest.max() / largest.median())


def outliers(model: Any, vocabulary: Any) -> list[dict[str, float]]:
    """One entry for each decoder layer: `weights` and `activations` (excess kurtosis), `channel_ratio`."""
    import torch

    seen: dict[int, list[dict[str, float]]] = defaultdict(list)

    def hook(number: int, linear: Any) -> Any:
        def look(module: Any, inputs: tuple["torch.Tensor", ...]) -> None:
            rows = inputs[0].flatten(0, -2).float()
            facts = {"weights": kurtosis(linear.weight), "activations": kurtosis(rows)}
            seen[number].append({**facts, "channel_ratio": channel_ratio(rows)})

        return linear.register_forward_pre_hook(look)

    hooks = [
        hook(number, module)
        for number, layer in enumerate(model.model.layers)
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    ids = vocabulary.encode("\n\n".join(world.texts("test")), add_special_tokens=False, verbose=False)
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor(ids[: WINDOWS * 512]).view(WINDOWS, 512), use_cache=False)
    finally:
        for one in hooks:
            one.remove()
    return [{key: round(max(f[key] for f in facts), 2) for key in facts[0]} for _, facts in sorted(seen.items())]


def card(name: str, recipes: list[str], limit: int | None = None, report: Any = print) -> dict[str, Any]:
    """Everything that is said about one shipped model, and its scores after `recipes`; `limit` takes so many items."""
    facts = json.loads((folder(name) / "training.json").read_text(encoding="utf-8"))
    model, vocabulary = reference_scores.load(name)
    found: dict[str, Any] = {}
    seconds = {}
    for recipe in (None, *recipes):
        scored = reference_scores.load(name, recipe) if recipe else (model, vocabulary)
        started = time.monotonic()
        scores = reference_scores.scores(*scored, limit=limit)
        seconds[recipe] = round(time.monotonic() - started)
        found[recipe or "as it is"] = {
            task: {"value": round(s.value, 4), "low": round(s.low, 4), "high": round(s.high, 4), "items": s.items}
            for task, s in scores.items()
        }
        report(f"{name} {recipe or ''}: " + ", ".join(f"{task} {s.value:.3f}" for task, s in scores.items()))
    weights = hashlib.sha256((folder(name) / "model.safetensors").read_bytes()).hexdigest()
    return {
        **facts,
        "weights_sha256": weights,
        "scores": found,
        "scored_in_seconds": seconds[None],
        "outliers": outliers(model, vocabulary),
    }


def table(cards: dict[str, dict[str, Any]]) -> str:
    """The part of README.md that comes from the cards."""
    student, teacher = (cards[name] for name in NAMES)
    rows = [["", "student", "teacher"], ["---", "---:", "---:"]]
    for label, read in {
        "Parameters": lambda c: f"{c['parameters']:,}",
        "Layers, hidden, intermediate": lambda c: "{layers}, {hidden}, {intermediate}".format(**c["shape"]),
        "Heads, KV heads": lambda c: "{heads}, {kv_heads}".format(**c["shape"]),
        "Training steps": lambda c: f"{c['steps']:,}",
        "Training tokens": lambda c: f"{c['tokens']:,}",
        "Training time (shared CPU cores)": lambda c: f"{c['seconds'] / 60:.0f} min",
        "Loss on validation text after nine tenths of the steps, and at the end (nat)": lambda c: ", ".join(
            f"{nat:.4f}" for nat in c["held_out_nat"].values()
        ),
        "Seed": lambda c: str(c["seed"]),
        "SHA-256 of the weights, first 12 digits": lambda c: c["weights_sha256"][:12],
    }.items():
        rows.append([label, read(student), read(teacher)])
    for task in reference_scores.SCORED:
        cells = [c["scores"]["as it is"][task] for c in (student, teacher)]
        rows.append([f"`{task}`", *("{value:.3f} ({low:.3f} to {high:.3f})".format(**cell) for cell in cells)])
    rows.append(["Time to score all tasks", *(f"{c['scored_in_seconds']} s" for c in (student, teacher))])
    parts = ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
    if len(student["scores"]) > 1:
        recipes = list(student["scores"])
        rows = [["student", *(f"`{r}`" if " " not in r else r for r in recipes)], ["---", *("---:" for _ in recipes)]]
        for task in reference_scores.SCORED:
            rows.append([f"`{task}`", *(f"{student['scores'][r][task]['value']:.3f}" for r in recipes)])
        means = [statistics.mean(student["scores"][r][task]["value"] for task in TASKS) for r in recipes]
        rows.append([f"mean of the first {len(TASKS)}", *(f"{mean:.3f}" for mean in means)])
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    lines = []
    for name in NAMES:
        layers = cards[name]["outliers"]
        said = {key: (statistics.median(f[key] for f in layers), max(f[key] for f in layers)) for key in layers[0]}
        lines.append(
            f"- {name}, median and largest over its {len(layers)} layers: excess kurtosis of weights "
            "{weights[0]:.1f} and {weights[1]:.1f}, of activations {activations[0]:.1f} and {activations[1]:.1f}; "
            "largest channel ratio {channel_ratio[0]:.1f} and {channel_ratio[1]:.1f}.".format(**said)
        )
    lines += [f"- Published: {what}." for what in PUBLISHED]
    parts.append("\n".join(lines))
    return "\n\n".join(parts)


def write(cards: dict[str, dict[str, Any]], readme: Path) -> None:
    """Cards beside the weights, and the table of all cards between the two marks of the README."""
    for name, one in cards.items():
        (folder(name) / "card.json").write_text(json.dumps(one, indent=2) + "\n", encoding="utf-8")
    cards = {name: json.loads((folder(name) / "card.json").read_text(encoding="utf-8")) for name in NAMES}
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n\n{table(cards)}\n\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.commands.card_of_reference", description="Write the model cards."
    )
    parser.add_argument("--name", action="append", choices=NAMES, help="default: both")
    parser.add_argument(
        "--recipes", nargs="*", default=["rtn(bits=4)", "rtn(bits=3)", "rtn(bits=2)"], help="scored on the student"
    )
    parser.add_argument("--limit", type=int, help="items per task (default: all)")
    options = parser.parse_args(arguments)
    cards = {
        name: card(name, options.recipes if name == "student" else [], options.limit) for name in options.name or NAMES
    }
    write(cards, Path(reference.__file__).parent / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
