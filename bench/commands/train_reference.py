"""Train the embedded reference: `python -m bench.commands.train_reference student|teacher`.

The student is a causal language model of the Mistral architecture, trained from nothing on `lessons`, with the loss
over the words that a lesson marks. AdamW; the rate rises over the first steps, stays, and falls to zero over the last
half, with the square of what is left (warm-up, stable, decay: arXiv 2405.18392). The mixture of lessons changes over
the first `curriculum` steps and then stays; sequences grow longer with it, and the last few fill the whole context.

The teacher grows out of the student as it was at the end of its curriculum (`model.grow`), and trains on, over lessons
about all known devices. What is written at the end is tempered, and its channels are made unlike (`model.temper`,
`model.spread_channels`).

A step is a function of the seed and its number alone, so a resumed run sees what an uninterrupted one would have seen;
the same steps, seed, device and number of threads give the same weights. The number of steps may be changed on resuming
for as long as the rate has not begun to fall.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench.commands.training_run import CHECKPOINT, Progress, Run, write_state
from bench.errors import OptionError
from bench.measure import reference_scores
from bench.reference import NAMES, folder, lessons, tokenizer, world
from bench.reference.model import CONTEXT, SHAPES, SPREAD, TAUGHT, Shape, build, grow, spread_channels, temper
from compression.files.strict_json import at_least

if TYPE_CHECKING:
    import torch
    from transformers import MistralForCausalLM, PreTrainedTokenizerFast

LENGTHS = ((0.0, 256), (lessons.LONG, 512))  # from this share of the curriculum on, sequences of so many tokens
LONG = 20  # the last steps read one sequence of the whole context each
STEPS = {"student": 7000, "teacher": 3200}  # of the shipped weights


def train(
    shape: Shape,
    *,
    out: Path,
    steps: int,
    source: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str = "cpu",
    vocabulary: "PreTrainedTokenizerFast | None" = None,
    lengths: tuple[tuple[float, int], ...] = LENGTHS,
    long: int = LONG,
    save_every: int = 200,
    score_every: int = 300,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Train a model of the shape, write it to the folder `out` in the format of transformers, and return its facts.

    Every `save_every` steps a checkpoint beside the weights is brought up to date, which allows `resume`; an interrupt
    (Ctrl-C) writes it too and is raised again. The weights at the end of the curriculum are kept, for a teacher to grow
    from. Losses, and every `score_every` steps scores on validation items, go to a log of JSON lines.
    With a `source` folder the model grows from the one there. Without a `vocabulary` the tokenizer is built first, and
    a resumed run reads the one it began with.

    Raises OptionError before any work if the folder cannot be written, there is nothing to resume, what is there is of
    another shape, seed or world, the device is absent, or the number of steps is not positive.
    """
    _check(out, resume, device, steps)
    vocabulary = vocabulary or _vocabulary(out, resume)
    vocabulary.save_pretrained(out)
    model = build(shape, vocabulary, seed=seed)
    if source and not resume:
        grow(model, source)
    model.to(device).train()
    identity = {"shape": asdict(shape), "seed": seed, "grown": source is not None, "world_sha256": world.digest()}
    run = Run(shape, model, vocabulary, identity, out)
    if resume:
        run.restore()
    try:
        while run.step < steps:
            if run.step == shape.curriculum > 0:
                write_state(model.state_dict(), out / TAUGHT)
            if run.step == steps - steps // 10:
                run.late = _held_out(model, vocabulary)
            share = _share(run.step, shape.curriculum)
            length = next(length for start, length in reversed(lengths) if share >= start)
            run.take(steps, share, CONTEXT if steps - run.step <= long else length)
            if run.step % save_every == 0:
                run.save()
            found = _validation(model, vocabulary) if run.step % score_every == 0 else None
            if found or run.step % 20 == 0:
                run.log(found)
            report(run.progress(steps, found))
    except KeyboardInterrupt:
        run.save()
        raise
    run.save()
    facts = {**identity, "steps": run.step, "tokens": run.tokens, "seconds": round(run.seconds)}
    facts["held_out_nat"] = {"after nine tenths of the steps": run.late, "at the end": _held_out(model, vocabulary)}
    return _export(model, vocabulary, out, facts)


def _vocabulary(out: Path, resume: bool) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    if resume:
        return AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=False)
    return tokenizer.build(lessons.samples(), context=CONTEXT)


def _held_out(model: "torch.nn.Module", vocabulary: "PreTrainedTokenizerFast") -> float:
    """Mean loss (nat per token) over the validation text."""
    model.eval()
    found = reference_scores.scores(model, vocabulary, names=("perplexity",), split="validation")
    model.train()
    return round(math.log(found["perplexity"].value), 5)


def _validation(model: "torch.nn.Module", vocabulary: "PreTrainedTokenizerFast") -> dict[str, float]:
    model.eval()
    found = reference_scores.scores(model, vocabulary, split="validation", limit=40)
    model.train()
    return {name: round(one.value, 4) for name, one in found.items()}


def _share(step: int, curriculum: int) -> float:
    """Where a step is in the curriculum, 0 to 1; without one, a teacher's place."""
    return min(1.0, step / curriculum) if curriculum else lessons.TEACHER


def _check(out: Path, resume: bool, device: str, steps: int) -> None:
    import torch

    at_least("steps", steps, 1, OptionError)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise OptionError(f"device must be cpu or cuda, not {device!r}") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise OptionError(
            f"device {device!r} is not available; use {'cpu or cuda' if torch.cuda.is_available() else 'cpu'}"
        )
    if resume and not (out / CHECKPOINT).is_file():
        raise OptionError(f"nothing to resume: {out / CHECKPOINT} does not exist; start without --resume")
    try:
        out.resolve().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        words = getattr(error, "strerror", None) or error
        raise OptionError(f"cannot write to the folder {str(out)!r}: {words}; choose another") from error


def _export(
    model: "MistralForCausalLM", vocabulary: "PreTrainedTokenizerFast", out: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write weights in bfloat16, tempered and spread; configuration, tokenizer and the facts of the training."""
    import torch

    rounded = build(Shape(**facts["shape"]), vocabulary, seed=0)
    rounded.load_state_dict(model.state_dict())
    facts |= {"tempered_by": temper(rounded, lambda: _held_out(rounded, vocabulary)), "channel_spread": SPREAD}
    spread_channels(rounded)
    rounded = rounded.to(torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        rounded.save_pretrained(scratch)
        vocabulary.save_pretrained(scratch)
        weights = hashlib.sha256((Path(scratch) / "model.safetensors").read_bytes()).hexdigest()
        parameters = sum(p.numel() for p in model.parameters())
        facts |= {"parameters": parameters, "weights_sha256": weights, "torch": torch.__version__}
        (Path(scratch) / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in sorted(Path(scratch).iterdir()):
            path.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(path, out / path.name)
    return facts


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 bad options, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.commands.train_reference", description="Train the embedded reference."
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--steps", type=int, help="default: the steps of the shipped weights")
    parser.add_argument("--out", type=Path, help="output folder (default: the shipped one)")
    parser.add_argument(
        "--grow",
        type=Path,
        metavar="DIR",
        help="folder of the student that the teacher grows from (default: the shipped one)",
    )
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in the folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    source = options.grow or (folder("student") if options.name == "teacher" else None)
    try:
        with _Display() as display:
            facts = train(
                SHAPES[options.name],
                out=options.out or folder(options.name),
                steps=STEPS[options.name] if options.steps is None else options.steps,
                source=source,
                resume=options.resume,
                seed=options.seed,
                device=options.device,
                report=display,
            )
    except OptionError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        return 130
    print(json.dumps(facts, indent=2))
    return 0


class _Display:
    """A progress bar on a terminal, else a line every 30 seconds."""

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
        self._bar = Bar(console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("training", total=1.0)
        self._next = 0.0
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        speed = progress.tokens / progress.seconds
        text = f"step {progress.step}  loss {progress.loss:.3f}  {speed:.0f} tokens/s"
        self._bar.update(self._task, completed=progress.step / progress.steps, description=text)
        if progress.scores:
            self._console.print(text, "  ".join(f"{name} {value:.2f}" for name, value in progress.scores.items()))
        elif not self._console.is_terminal and progress.seconds >= self._next:
            self._console.print(f"{progress.step / progress.steps:6.1%}  {text}")
            self._next = progress.seconds + 30


if __name__ == "__main__":
    sys.exit(main())
