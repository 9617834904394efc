"""Made-up results of steps in every order, whose comparison is known."""

import math
import random

from healthy_results import healthy_row

from bench.report.orders import CONTROL, ORDERS
from bench.results.items import Items, hashes_of

HASHES = hashes_of(range(40))


def rows_of(losses, *, size=1 << 20, noise=0.01):
    """Rows of size and perplexity for each recipe: windows of text are easy or hard for all, and differ by noise."""
    draw = random.Random(0)
    windows = [draw.uniform(0, 2) for _ in HASHES]
    found = []
    for recipe, loss in losses.items():
        values = [window + loss + draw.gauss(0, noise) for window in windows]
        off = loss + sum(windows) / len(windows) - sum(values) / len(values)
        items = Items(HASHES, tuple(value + off for value in values), "real")
        found.append(healthy_row("quality.perplexity", recipe=recipe, value=math.exp(items.mean), items=items))
        found.append(
            healthy_row("efficiency.stored_bytes", recipe=recipe, value=2 * size if recipe == "fp16" else size)
        )
    return found


LOSSES = {"fp16": 0.5, "p": 0.6, "kd": 0.4, CONTROL: 0.45, "nf4": 0.55} | dict(
    zip(ORDERS, (0.50, 0.52, 0.51, 0.70, 0.72, 0.71), strict=True)
)
