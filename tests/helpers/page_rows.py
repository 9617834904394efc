"""Rows that a page of the report is made of, and readers of what it holds.

The rows are those of benchmarks/report_page.py and of the orders, with one that failed and one of a base whose name
would be markup.
"""

import base64
import gzip
import json
import re
from dataclasses import replace

from healthy_results import healthy_row
from order_rows import LOSSES, rows_of
from scripts import benchmark

from bench.results.records import Contents

made = benchmark("report_page")

OTHER, REASON = "my<b>base</b>&co", "</script><script>document.title = 'broken out'</script>"
RUNS = 5


def results():
    """Rows of several runs, two bases and two devices, and the journal that they are of."""
    journal = made.contents(made.recipes(9), made.metrics(16), RUNS, blocks=2)
    ordered = [replace(row, run="run-orders") for row in rows_of(LOSSES)]
    odd = [
        healthy_row("efficiency.stored_bytes", run="run-odd", base=OTHER, recipe="nf4", value=3e6, base_value=1e7),
        healthy_row("quality.perplexity", run="run-odd", base=OTHER, recipe="nf4", value=None, status="failed",
                    reason=REASON),
    ]  # fmt: skip
    later = [{"kind": "row", "time": 1.9e9, **row.to_json()} for row in (*ordered, *odd)]
    gone = {"kind": "verdict", "run": "run-odd", "time": 1.9e9, "recipe": "nf4", "outcome": "missing",
            "key": "efficiency.decode_ms", "words": "nf4: efficiency.decode_ms is missing"}  # fmt: skip
    contents = Contents(records=[*journal.records, *later, gone], torn=[], writing=frozenset())
    return contents.rows(), contents


def held(text, name):
    """What the page holds in one of its elements of data."""
    found = re.search(rf'<script type="application/json(\+gzip)?" id="{name}">(.*?)</script>', text, re.DOTALL)
    return json.loads(gzip.decompress(base64.b64decode(found[2])) if found[1] else found[2])


def unpacked(words):
    """The slow reader of `past.packed`."""
    values = []
    for word in words.split():
        if word.startswith("_"):
            values += [None] * int(word[1:])
        elif word.startswith("="):
            values += [values[-1]] * int(word[1:])
        else:
            values.append(float(word))
    return values
