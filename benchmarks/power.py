"""How small a loss the paired test of answers sees, and how often it is wrong, by simulation from recorded answers.

    python benchmarks/power.py                 # simulate, from benchmarks/answers/
    python benchmarks/power.py --record        # score the reference anew: its four-way tasks, fp16 and recipes

`answers/` holds, as beside a baseline (`results.items`), which of 2,000 questions the reference answers right, as it is
and compressed. A trial draws 10,000 pairs (before, after) from them with replacement: a recorded question with its two
recorded answers, out of all recipes. Weights by what became of an answer (lost, gained, kept) make the share of answers
that flip and the loss of accuracy what the line says. The tests read only how many were lost, gained, kept right and
kept wrong, so a trial draws these four counts, which is the same as drawing the pairs one by one. Beside the paired
test stand its one-sided form and the unpaired test of two shares, on the same draws.

A second table draws recorded losses of windows of text (nat per token) in the same way, and puts a known shift in place
of their mean difference.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from bench.gate.verdicts import LEVEL
from bench.results import item_pairs
from bench.results import items as stored
from bench.results.items import Items, hashes_of
from bench.statistics import paired
from compression.recipes.recipe import slug

FOLDER = Path(__file__).parent / "answers"
TASKS = ("continuation", "facts_easy", "facts_hard", "categories")
BASE = "fp16"
RECIPES = ("nf4", "magnitude", "rtn(bits=3)")
ROWS = 48  # sequences in one forward pass
Z = 2.575829  # 99.5 % of the normal distribution: the unpaired tests at the same level


def recorded() -> dict[str, np.ndarray]:
    """Answers by recipe, all tasks one after another: 1 right, 0 wrong, (questions,)."""
    found = {}
    for recipe in (BASE, *RECIPES):
        rows = stored.load(FOLDER, slug(recipe))
        found[recipe] = np.concatenate([np.array(rows[task].values) for task in TASKS])
    return found


def transitions(answers: dict[str, np.ndarray]) -> np.ndarray:
    """What became of each answer under each recipe, (pairs, 2): right before, right after."""
    return np.concatenate([np.stack([answers[BASE], answers[recipe]], 1) for recipe in RECIPES]).astype(bool)


def weights(pairs: np.ndarray, flipped: float, loss: float) -> np.ndarray:
    """Probabilities of drawing each pair for which a share `flipped` flips and accuracy falls by `loss`, (pairs,)."""
    kinds = {(True, False): (flipped + loss) / 2, (False, True): (flipped - loss) / 2}
    before, after = pairs.T
    found = np.where(before == after, (1 - flipped) / (before == after).sum(), 0.0)
    for (was, is_), share in kinds.items():
        these = (before == was) & (after == is_)
        found[these] = share / these.sum()
    return found


def simulate(
    pairs: np.ndarray, *, flipped: float, loss: float, items: int, trials: int, seed: int = 0
) -> dict[str, float]:
    """Shares of trials in which each test declares a loss: the gate's, one-sided, unpaired; last, those with a gain."""
    probabilities = weights(pairs, flipped, loss)
    before, after = pairs.T
    kinds = [probabilities[(before == was) & (after == is_)].sum() for was in (0, 1) for is_ in (0, 1)]
    seen = dict.fromkeys(("paired", "one-sided", "unpaired", "gain"), 0)
    for _, gained, lost, right in np.random.default_rng(seed).multinomial(items, kinds, trials).tolist():
        p = paired.mcnemar(lost, gained)
        seen["paired"] += p <= LEVEL and lost > gained
        seen["gain"] += p <= LEVEL and gained > lost
        seen["one-sided"] += paired.mcnemar(lost, gained, "worse") <= LEVEL
        was, is_ = (right + lost) / items, (right + gained) / items
        seen["unpaired"] += was - is_ > Z * math.sqrt((was * (1 - was) + is_ * (1 - is_)) / items)
    return {name: count / trials for name, count in seen.items()}


def simulate_losses(
    base: np.ndarray, other: np.ndarray, *, shift: float, windows: int, trials: int, seed: int = 0
) -> dict[str, float]:
    """The same for losses in nat: recorded differences, their mean taken away and `shift` put in its place."""
    draw, seen = np.random.default_rng(seed), dict.fromkeys(("paired", "unpaired"), 0)
    differences = other - base - (other - base).mean() + shift
    for _ in range(trials):
        places = draw.integers(0, len(base), windows)
        d, before = differences[places], base[places]
        seen["paired"] += paired.permutation(d, resamples=999) <= LEVEL and d.mean() > 0
        error = math.sqrt((before.var() + (before + d).var()) / windows)
        seen["unpaired"] += d.mean() > Z * error
    return {name: count / trials for name, count in seen.items()}


def record() -> None:
    """Score the reference's tasks under each recipe, by the mean log-likelihood per token of each choice."""
    import compression
    from bench.data.sources import open_data
    from bench.measure.perplexity import perplexity
    from bench.measure.perplexity_windows import PerplexityProtocol
    from bench.reference import tasks

    base = compression.open_base("reference")
    data, protocol = open_data("embedded", base="reference"), PerplexityProtocol(batch_size=4)
    for recipe in (BASE, *RECIPES):
        model = compression.compress(base, recipe).model
        rows = {}
        for task in TASKS:
            asked = tasks.items(task, "test")
            chosen = choices(model, base.tokenizer, [(tasks.prompt(item), item["choices"]) for item in asked])
            right = [choice == item["answer"] for choice, item in zip(chosen, asked, strict=True)]
            hashes = hashes_of([tasks.prompt(item), item["choices"], item["answer"]] for item in asked)
            rows[task] = Items(hashes, right, "binary")
            print(f"{recipe} {task}: {rows[task].mean:.3f}", flush=True)
        reading = perplexity(model, base.tokenizer, data, protocol, device="cpu")
        rows["quality.nll"] = reading.items["quality.nll"]
        stored.save(FOLDER, slug(recipe), rows)


def choices(model: "object", tokenizer: "object", questions: list[tuple[str, list[str]]]) -> list[int]:
    """The likeliest choice of each (prompt, choices): plain padded forward passes, longest first.

    Choices that differ in their last token alone are one sequence.
    """
    import torch

    sequences: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for number, (prompt, texts) in enumerate(questions):
        start = tokenizer.encode(prompt, add_special_tokens=False, verbose=False)
        for text in texts:
            end = tokenizer.encode(text, add_special_tokens=False, verbose=False)
            sequences.setdefault((number, *start, *end[:-1]), []).append((number, end))
    longest_first = sorted(sequences.items(), key=lambda each: -len(each[0]))
    scores: dict[int, dict[tuple[int, ...], float]] = {}
    for at in range(0, len(longest_first), ROWS):
        batch = [(list(fed[1:]), ends) for fed, ends in longest_first[at : at + ROWS]]
        width = len(batch[0][0])
        ids = torch.tensor([fed + [0] * (width - len(fed)) for fed, _ in batch])
        mask = torch.tensor([[1] * len(fed) + [0] * (width - len(fed)) for fed, _ in batch])
        with torch.inference_mode():
            hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            for (fed, ends), states in zip(batch, hidden, strict=True):
                for number, end in ends:
                    logits = model.get_output_embeddings()(states[len(fed) - len(end) : len(fed)]).float()
                    score = logits.log_softmax(-1)[range(len(end)), end].mean()
                    scores.setdefault(number, {})[tuple(end)] = float(score)
    found = []
    for number, (_, texts) in enumerate(questions):
        ends = [tuple(tokenizer.encode(text, add_special_tokens=False, verbose=False)) for text in texts]
        found.append(max(range(len(ends)), key=lambda place, n=number, e=ends: scores[n][e[place]]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Power and false alarms of the paired tests, from recorded results.")
    parser.add_argument("--record", action="store_true", help="score the reference anew first")
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=10_000)
    options = parser.parse_args()
    if options.record:
        record()
    answers = recorded()
    pairs = transitions(answers)
    print(f"{len(answers[BASE])} questions, {100 * answers[BASE].mean():.1f} % right in {BASE}")
    for recipe in RECIPES:
        found = item_pairs.compare(*(as_items(answers[name]) for name in (recipe, BASE)))
        print(f"  {recipe}: {paired.words(found)}")
    print(f"\n{options.trials} trials of {options.items} questions; declared a loss at p {LEVEL:g}, %\n")
    print("| flipped, % | true loss, % | paired, two-sided | one-sided | unpaired | false gain |")
    print("| --- | --- | --- | --- | --- | --- |")
    for flipped in (0.02, 0.04, 0.06, 0.08, 0.10, 0.15):
        for loss in (0.01, 0.0):
            found = simulate(pairs, flipped=flipped, loss=loss, items=options.items, trials=options.trials)
            shown = " | ".join(f"{100 * share:.2f}" for share in found.values())
            print(f"| {100 * flipped:.0f} | {100 * loss:.0f} | {shown} |", flush=True)
    losses = {recipe: np.array(stored.load(FOLDER, slug(recipe))["quality.nll"].values) for recipe in (BASE, *RECIPES)}
    print(f"\n{options.trials // 10} trials of 100 windows of text; a shift declared a loss at p {LEVEL:g}, %\n")
    print("| differences of | true shift, nat/token | paired | unpaired |\n| --- | --- | --- | --- |")
    for recipe in RECIPES:
        for shift in (0.01, 0.003, 0.0):
            found = simulate_losses(losses[BASE], losses[recipe], shift=shift, windows=100, trials=options.trials // 10)
            print(f"| {recipe} | {shift:g} | " + " | ".join(f"{100 * share:.1f}" for share in found.values()) + " |")
    return 0


def as_items(answers: np.ndarray) -> Items:
    return Items(hashes_of(range(len(answers))), answers.tolist(), "binary")


if __name__ == "__main__":
    sys.exit(main())
