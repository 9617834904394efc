"""Score the embedded reference on its tasks: `python -m bench.measure.reference_scores [--json] [--model RECIPE ...]`.

- Choice tasks: the share of items whose right choice has the highest mean log-likelihood per token after the prompt.
- arithmetic: greedy decoding, exact match of what follows `####`.
- code: greedy decoding; the share of functions that pass all their tests, each run in a sandbox (`sandbox.run`).
- rag, no_rag: greedy decoding to the end of the line, token F1 with SQuAD's normalisation (lower case, no punctuation
  or articles), the mean over questions; rag reads three manuals, one of which has the answer.
- perplexity: `bench.metrics.perplexity` over held-out text, all disjoint windows of 512 tokens.

Choices are scored by `lm_eval`, answers written by `answering`: what many prompts begin with is read once.
Models are computed in float32. Intervals are 95 %: Wilson's for shares, the percentile bootstrap (1,000 resamples) for
F1, and for perplexity the bootstrap over windows.
"""

import argparse
import json
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.data.sources import open_data
from bench.errors import OptionError
from bench.measure import scoring
from bench.measure.answering import answer
from bench.measure.perplexity import perplexity
from bench.measure.perplexity_windows import PerplexityProtocol
from bench.measure.sandbox import run as sandbox
from bench.reference import NAMES, tasks
from bench.reference.tasks import Item
from bench.reference.world import Draw

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

CHOICES = ("continuation", "facts_easy", "facts_hard", "categories")
SCORED = (*CHOICES, "arithmetic", "code", "rag", "no_rag", "perplexity")
NEW_TOKENS = {"arithmetic": 40, "code": 72, "rag": 6, "no_rag": 6}
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score and its 95 % interval over `items` items (for perplexity, windows)."""

    value: float
    low: float
    high: float
    items: int


def scores(
    model: "torch.nn.Module",
    vocabulary: "PreTrainedTokenizerFast",
    *,
    names: Sequence[str] = SCORED,
    split: str = "test",
    limit: int | None = None,
    report: Callable[[str, Score], None] = lambda name, score: None,
) -> dict[str, Score]:
    """Scores of a model in eval mode; `limit` takes so many items of each task, drawn by a fixed seed.

    Raises OptionError for an unknown name.
    """
    if unknown := set(names) - set(SCORED):
        raise OptionError(f"tasks {', '.join(sorted(unknown))} are not scored; tasks must be among {', '.join(SCORED)}")
    found = {}
    for name in names:
        if name == "perplexity":
            found[name] = _perplexity(model, vocabulary, split, limit)
        else:
            chosen = tasks.items(name, split)
            chosen = Draw("limit", name).some(chosen, min(limit, len(chosen))) if limit else chosen
            found[name] = (_mean if name in ("rag", "no_rag") else _share)(points(model, vocabulary, chosen))
        report(name, found[name])
    return found


def points(model: "torch.nn.Module", vocabulary: "PreTrainedTokenizerFast", items: Sequence[Item]) -> list[float]:
    """Points of a model in eval mode on items of one task, each 0 to 1 in their order."""
    return (_choice_points if items[0]["task"] in CHOICES else _answer_points)(model, vocabulary, items)


def f1(answer: str, truth: str) -> float:
    """Token F1 of an answer, as SQuAD's evaluation script normalises and counts.

    >>> f1("The 42 coins.", "42 grams")
    0.5
    """
    given, wanted = _normalised(answer), _normalised(truth)
    common = (Counter(given) & Counter(wanted)).total()
    if not given or not wanted or not common:
        return float(given == wanted)
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _normalised(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def likelihoods(
    model: "torch.nn.Module", vocabulary: "PreTrainedTokenizerFast", items: Sequence[Item]
) -> list[list[float]]:
    """Mean log-likelihood (nat per token) of every choice of every item after its prompt."""
    prompts = [tasks.prompt(item) for item in items for _ in item["choices"]]
    choices = [choice for item in items for choice in item["choices"]]
    means = iter(scoring.lm_eval.Scorer(model, vocabulary).mean_logprobs(prompts, choices))
    return [[next(means) for _ in item["choices"]] for item in items]


def _choice_points(model: Any, vocabulary: Any, items: Sequence[Item]) -> list[float]:
    found = likelihoods(model, vocabulary, items)
    return [float(max(range(4), key=row.__getitem__) == item["answer"]) for row, item in zip(found, items, strict=True)]


def _answer_points(model: Any, vocabulary: Any, items: Sequence[Item]) -> list[float]:
    task = items[0]["task"]
    end = "\n\n" if task == "code" else "\n"
    prompts = [tasks.prompt(item) for item in items]
    said = [each.text for each in answer(model, vocabulary, prompts, new_tokens=NEW_TOKENS[task], stops=(end,))]
    if task == "arithmetic":
        finals = [text.rpartition("####")[2].strip() for text in said]
        return [float(final == item["final"]) for final, item in zip(finals, items, strict=True)]
    if task == "code":
        written = [item["question"] + text for item, text in zip(items, said, strict=True)]
        programs = ["\n".join([text, *item["tests"]]) for item, text in zip(items, written, strict=True)]
        return [float(outcome.passed) for outcome in sandbox.run_all(programs)]
    return [f1(text, item["answer"]) for text, item in zip(said, items, strict=True)]


def _perplexity(model: Any, vocabulary: Any, split: str, limit: int | None) -> Score:
    protocol = PerplexityProtocol(samples=limit or 1000, split=split)
    reading = perplexity(model, vocabulary, open_data("embedded", base="reference"), protocol, device=model.device)
    low, high = (math.exp(end) for end in _bootstrap(reading.sample_means))
    return Score(value=reading.perplexity, low=low, high=high, items=len(reading.sample_means))


def _share(points: Sequence[float]) -> Score:
    """A share with Wilson's score interval (Wilson 1927, JASA 22)."""
    n, share, z = len(points), sum(points) / len(points), 1.96
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((centre + side * spread) / (1 + z * z / n) for side in (-1, 1))
    return Score(value=share, low=max(0.0, min(low, share)), high=min(1.0, max(high, share)), items=n)  # of none or all


def _mean(points: Sequence[float]) -> Score:
    low, high = _bootstrap(points)
    return Score(value=sum(points) / len(points), low=low, high=high, items=len(points))


def _bootstrap(points: Sequence[float]) -> tuple[float, float]:
    """2.5 and 97.5 percentiles of the mean over resamples."""
    draw = Draw("bootstrap", len(points))
    means = sorted(sum(draw.one(points) for _ in points) / len(points) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


def load(name: str, recipe: str | None = None, *, device: str = "cpu") -> tuple[Any, Any]:
    """Model (eval mode, float32 where it is dense) and tokenizer of a shipped reference, after a recipe if given."""
    import compression

    base = compression.open_base({"student": "reference", "teacher": "reference-teacher"}[name], device)
    if recipe is None:
        return base.model.float(), base.tokenizer
    return compression.compress(base, recipe).model.float(), base.tokenizer


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.measure.reference_scores", description="Score the embedded reference on its tasks."
    )
    parser.add_argument("--json", action="store_true", help="print values only, as JSON")
    parser.add_argument(
        "--model", action="append", metavar="RECIPE", help="score the student after this recipe instead"
    )
    parser.add_argument("--limit", type=int, help="items per task (default: all)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    wanted = [("student", recipe) for recipe in options.model] if options.model else [(name, None) for name in NAMES]
    found = {}
    for name, recipe in wanted:
        label = f"{name} {recipe}" if recipe else name
        found[label] = scores(*load(name, recipe, device=options.device), limit=options.limit)
        if not options.json:
            print(label)
            for task, score in found[label].items():
                print(f"  {task:13} {score.value:6.3f}  [{score.low:.3f}, {score.high:.3f}]  {score.items} items")
    if options.json:
        print(json.dumps({label: {task: score.value for task, score in of.items()} for label, of in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
