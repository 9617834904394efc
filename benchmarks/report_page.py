"""Weight of a large report page and time that Chromium takes to open it.

    python benchmarks/report_page.py [--recipes 60] [--metrics 60] [--runs 100] [--rounds 3] [--out FILE]

The results are made up: recipes of all families, metrics of the registry, every recipe and metric measured in every
run, no value like another (what does not change between runs takes less), layers of a model of 32 blocks, a verdict on
every row. `made` is how long the page took to make. Of opening it, from the request of the file: `painted` is the first
paint with content, `loaded` the load event, by which overview, fronts and tables are there and the script has run;
`history` and `filter` are what drawing the history of one metric of all recipes, and filtering by a name, take beyond
that. The median of the rounds, each in a browser of its own, at 1280 and 390 pixels' width.
"""

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.metrics import all_metrics
from bench.report.page import page
from bench.results.records import Contents
from bench.results.row import Row

FIRST = {  # those of the overview, and between which values
    "quality.average_accuracy": (0.4, 0.9), "quality.perplexity": (2.4, 4.0), "rag.f1": (0.4, 0.8),
    "rag.no_rag_f1": (0.05, 0.15), "efficiency.stored_bytes": (3e6, 1e7), "efficiency.bits_per_parameter": (3, 16),
    "efficiency.latency_ms": (2, 6), "efficiency.energy_mj_per_token": (8, 25), "efficiency.peak_memory_mb": (5, 14),
}  # fmt: skip
DEVICE = "cpu-made-up-2t"
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


def recipes(count: int) -> list[str]:
    """fp16, then recipes of all kinds that differ in a number."""
    found = ["fp16", "p-kd-nf4", "p-nf4-kd", "kd-p-nf4", "nf4"]
    for number in range(2, 9):
        for group in (32, 64, 128):
            bits = [f"rtn(bits={number},group_size={group})", f"gptq(bits={number},group_size={group})"]
            found += [*(bits if number in (2, 3, 4, 8) else ()), f"wanda(sparsity=0.{number}{group % 10})"]
            found += [f"kd-magnitude(sparsity=0.{number}{group % 10})"]
    found = list(dict.fromkeys(found))
    if count > len(found):
        raise SystemExit(f"--recipes {count}: at most {len(found)}")
    return found[:count]


def metrics(count: int) -> list[str]:
    """Names of metrics: those of the overview, then the others of the registry."""
    found = [*FIRST, *sorted(all_metrics().keys() - FIRST.keys())]
    if count > len(found):
        raise SystemExit(f"--metrics {count}: the registry has {len(found)}")
    return found[:count]


def contents(recipes: list[str], metrics: list[str], runs: int, *, blocks: int = 32, seed: int = 0) -> Contents:
    """A journal in memory: every recipe and metric in every run, an hour apart."""
    draw = random.Random(seed)
    known = all_metrics()
    rows = [
        Row(run="run-0", base="reference", recipe=recipe, device=DEVICE, metric=name, value=1.0, unit=known[name].unit,
            better=known[name].better, seed=0, of=known[name].of, base_value=1.0, ratio=1.0,
            params={"batch": 1, "decoding": "greedy", "mode": "eager"}).to_json()
        for recipe in recipes for name in metrics
    ]  # fmt: skip
    usual = [draw.uniform(*FIRST.get(row["metric"], (0.1, 100))) for row in rows]
    return Contents(records=list(_records(rows, usual, runs, blocks, draw)), torn=[], writing=frozenset())


def _records(
    rows: list[dict], usual: list[float], runs: int, blocks: int, draw: random.Random
) -> Iterator[dict[str, Any]]:
    for number in range(runs):
        common = {"run": f"run-{number}", "time": 1.8e9 + 3600 * number}
        yield common | {
            "kind": "run",
            "context": {
                "base": "reference",
                "fingerprint": DEVICE,
                "torch": "2.13.0",
                "commit": f"{draw.getrandbits(48):012x}",
                "command": "pytest bench",
            },
        }
        for row, value in zip(rows, usual, strict=True):
            now, base = value * draw.gauss(1, 0.01), value * draw.gauss(2, 0.02)
            yield row | common | {"kind": "row", "value": now, "base_value": base, "ratio": now / base}
        for row in rows if number == runs - 1 else ():
            outcome = draw.choices(("pass", "improved", "inconclusive", "regressed"), (95, 2, 2, 1))[0]
            yield common | {
                "kind": "verdict",
                "recipe": row["recipe"],
                "outcome": outcome,
                "key": f"{row['metric']}[batch=1,decoding=greedy,mode=eager]",
                "words": f"{row['recipe']}: {row['metric']} {outcome}: 1 -> 2 (+100 %, allowed +15 %)",
            }
        yield common | {"kind": "end", "status": "passed"}
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        layers = [
            {"name": f"model.layers.{block}.{part}", "outcome": "replaced", "bits": 4.25, "of": "output",
             "error": (error := draw.lognormvariate(-4, 1)),
             "detail": f"{recipe}, kernel lut4, output error {error:.3g} (nearest: {draw.lognormvariate(-3, 1):.3g})"}
            for block in range(blocks) for part in PARTS
        ]  # fmt: skip
        yield common | {
            "kind": "layers", "base": "reference", "device": DEVICE, "recipe": recipe, "executed": [recipe],
            "seconds": [1.25], "kernels": {"lut4": len(layers)}, "layers": layers,
        }  # fmt: skip


def opened(path: Path, width: int) -> dict[str, float]:
    """Milliseconds of what the browser does with the page. See the module."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(path.as_uri())
        return browser.execute_async_script(
            """
            const done = arguments[0], entry = performance.getEntriesByType("navigation")[0];
            const drawn = () => new Promise((go) => requestAnimationFrame(() => setTimeout(go, 0)));
            (async () => {
              let begin = performance.now();
              document.getElementById("history").scrollIntoView({ behavior: "instant" });
              while (!document.querySelector("#history-charts figure")) await drawn();
              await drawn();
              const history = performance.now() - begin;
              begin = performance.now();
              document.getElementById("find").value = "gptq";
              document.getElementById("find").dispatchEvent(new Event("input", { bubbles: true }));
              await drawn();
              const painted = performance.getEntriesByName("first-contentful-paint")[0].startTime;
              done({ painted, loaded: entry.loadEventEnd, history, filter: performance.now() - begin });
            })();
            """
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("recipes", 60), ("metrics", 60), ("runs", 100), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="keep the page in this file")
    options = parser.parse_args()
    journal = contents(recipes(options.recipes), metrics(options.metrics), options.runs)
    last = Contents(records=[each for each in journal.records if each["run"] == f"run-{options.runs - 1}"], torn=[],
                    writing=frozenset()).rows()  # fmt: skip
    begin = time.perf_counter()
    text = page(last, journal)
    print(f"made in {time.perf_counter() - begin:.1f} s: {len(text.encode()) / 1e6:.2f} MB")
    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder) / "page.html"
        path.write_text(text)
        for width in (1280, 390):
            rounds = [opened(path.resolve(), width) for _ in range(options.rounds)]
            medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
            print(f"{width} px: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in medians.items()))


if __name__ == "__main__":
    main()
