"""What computing in fp32 saves a base in bf16 on this processor, and what it changes.

python benchmarks/compute_dtype.py --data FOLDER          # which holds wikitext-2/; writes figures/compute-dtype.md
python benchmarks/compute_dtype.py --small-change FOLDER  # writes figures/compute-dtype-small-change.md
python benchmarks/compute_dtype.py --baselines baselines  # writes figures/compute-dtype-baselines.md

The first command runs both ways in turn in one process: perplexity over disjoint windows of 512 tokens, and answers to
prompts of one batch. Times are processor time, the least of the rounds: what disturbs a round only makes it slower. The
divergence is between the two readings of one model. The second command measures a recipe that hardly changes the model
both ways, because its divergence shows the rounding of activations best. The third computes recipes of the reference in
fp32 and compares them with the recorded rows. They read no calibration text, so only the arithmetic differs.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import compression
from bench.data.sources import open_data
from bench.gate.baseline import ANYWHERE, Baseline
from bench.gate.entry import Entry
from bench.machine import device
from bench.measure.answering import answer
from bench.measure.perplexity import KeptStates, perplexity
from bench.measure.perplexity_windows import PerplexityProtocol
from bench.metrics.divergence import kl_to_base, top1_agreement
from compression.layers.float32 import in_float32

FIGURES = Path(__file__).parent / "figures"
RECIPES = ("fp16", "nf4", "rtn", "rtn(bits=3)", "rtn(bits=2)", "hqq", "magnitude", "llm_int8")
METRICS = ("quality.perplexity", "quality.nll", "quality.kl_to_base", "quality.top1_agreement")
SMALL = "rtn(bits=8,group_size=64)"
BASES = ("reference", "smollm2")
PROMPTS, NEW_TOKENS = 32, 16
HEADS = ("base", "stored, s", "float32, s", "ratio", "answers: stored, s", "float32, s", "ratio",
         "perplexity: stored", "float32", "change", "divergence, nat")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--data")
    wanted.add_argument("--small-change", metavar="FOLDER")
    wanted.add_argument("--baselines")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.baselines:
        return compare(options.baselines)
    if options.small_change:
        return change_little(options.small_change, options.windows)
    rows = [measured(name, options) for name in BASES]
    threads = torch.get_num_threads()
    note = (
        f"{options.windows} windows, {PROMPTS} answers of {NEW_TOKENS} tokens, {threads} thread{'s' * (threads != 1)}"
    )
    note += f", the least of {options.rounds} rounds"
    write("compute-dtype.md", "Quality of a base in bf16", note, "--data FOLDER", HEADS, rows)


def write(name: str, heading: str, note: str, arguments: str, heads: Sequence[str], rows: Sequence[list[str]]) -> None:
    """A file of figures with one table."""
    lines = [
        "# Computing in float32",
        "",
        f"## {heading}",
        "",
        f"On {device.fingerprint('cpu')}, torch {torch.__version__}: {note}.",
        "",
        f"Measured by `python benchmarks/compute_dtype.py {arguments}`.",
        "",
        f"| {' | '.join(heads)} |",
        f"| :--- |{' ---: |' * (len(heads) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    (FIGURES / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def change_little(folder: str, windows: int) -> None:
    """A recipe that hardly changes a model, in both dtypes."""
    rows = []
    for name in BASES:
        base = compression.open_base(name)
        model = compression.compress(base, SMALL).model
        data = open_data("embedded" if name == "reference" else folder, base=name)
        protocol = PerplexityProtocol(samples=windows, batch_size=4)
        found = [
            perplexity(each, base.tokenizer, data, protocol, device="cpu", base=beside).divergence
            for each, beside in ((model, base.model), (in_float32(model), in_float32(base.model)))
        ]
        row = [f"`{name}`"]
        for metric in (kl_to_base, top1_agreement):
            then, now = map(metric, found)
            row += [f"{then:.3g}", f"{now:.3g}", f"{now - then:+.1e}"]
        rows.append(row)
        print(*row, flush=True)
    heads = ("base", "divergence, nat: stored", "float32", "change", "agreement: stored", "float32", "change")
    write("compute-dtype-small-change.md", "A recipe that changes little", f"`{SMALL}`, {windows} windows",
          "--small-change FOLDER", heads, rows)  # fmt: skip


def compare(baselines: str) -> None:
    """Recipes of the reference in fp32, and their changes from the recorded rows."""
    source, data = compression.locate("reference"), open_data("embedded", base="reference")
    base = compression.open_base(source)
    wide, protocol = in_float32(base.model), PerplexityProtocol(batch_size=4)
    states, rows = KeptStates(wide), []
    for recipe in RECIPES:
        model = in_float32(compression.compress(base, recipe).model)
        reading = perplexity(model, base.tokenizer, data, protocol, device="cpu", base=wide, states=states)
        apart = reading.divergence
        values = (reading.perplexity, reading.mean_nll, kl_to_base(apart), top1_agreement(apart))
        recorded = Baseline.find(baselines, source.label, recipe, source.digest)
        rows.append([f"`{recipe}`", *changes(recorded, dict(zip(METRICS, values, strict=True)), reading.params)])
        print(*rows[-1], flush=True)
    heads = ("recipe", "perplexity", "loss", "divergence, nat", "agreement")
    write("compute-dtype-baselines.md", "Change from the recorded rows", f"{protocol.samples} windows",
          "--baselines baselines", heads, rows)  # fmt: skip


def changes(recorded: Baseline | None, values: dict[str, float], params: Mapping[str, Any]) -> Iterator[str]:
    """The change of each metric from its recorded row: a share for losses, a difference for the others."""
    rows: list[Entry] = [] if recorded is None else list(recorded.sections[ANYWHERE].rows.values())
    wanted = {name: value for name, value in params.items() if value is not None}
    for name, value in values.items():
        found = [each.value for each in rows if (each.metric, each.params) == (name, wanted)]
        if not found or not found[0]:
            yield "not recorded"
        elif name in METRICS[:2]:
            yield f"{100 * (value / found[0] - 1):+.3f} %"
        else:
            yield f"{value - found[0]:+.1e}"


def measured(name: str, options: argparse.Namespace) -> list[str]:
    """The row of one base."""
    base = compression.open_base(name)
    wide, tokenizer = in_float32(base.model), base.tokenizer
    data = open_data("embedded" if name == "reference" else options.data, base=name)
    protocol = PerplexityProtocol(samples=options.windows, batch_size=4)
    prompts = [f"Number {number} of a list of things to say begins as follows:" for number in range(PROMPTS)]

    def read(model: Any) -> float:
        return perplexity(model, tokenizer, data, protocol, device="cpu").perplexity

    def reply(model: Any) -> Any:
        return answer(model, tokenizer, prompts, new_tokens=NEW_TOKENS)

    models = (base.model, wide)
    (stored, float32), (then, now) = in_turn(read, models, options.rounds)
    answers, _ = in_turn(reply, models, options.rounds)
    apart = perplexity(base.model, tokenizer, data, protocol, device="cpu", base=wide).divergence
    row = [f"`{name}`", *timed(stored, float32), *timed(*answers), f"{then:.4f}", f"{now:.4f}",
           f"{100 * (now / then - 1):+.3f} %", f"{kl_to_base(apart):.1e}"]  # fmt: skip
    print(*row, flush=True)
    return row


def in_turn(work: Callable[[Any], Any], models: tuple[Any, Any], rounds: int) -> tuple[tuple[float, float], list[Any]]:
    """Least processor seconds of each model, one after the other in every round, and their results."""
    least, results = [float("inf")] * 2, [None, None]
    for _ in range(rounds):
        for place, model in enumerate(models):
            begin = time.process_time()
            results[place] = work(model)
            least[place] = min(least[place], time.process_time() - begin)
    return (least[0], least[1]), results


def timed(stored: float, float32: float) -> list[str]:
    return [f"{stored:.1f}", f"{float32:.1f}", f"{stored / float32:.1f}"]


if __name__ == "__main__":
    main()
