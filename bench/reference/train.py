"""Train the embedded reference: `python -m bench.reference.train student|teacher`.

A causal language model of the Mistral architecture is trained from nothing on `world.stream("train", ...)`, with
AdamW, a short warm-up and a cosine down to a tenth, over the share of the budget (steps or minutes) that is used up.
Sequences grow over the run: most of the training reads short ones, the end reads the whole context. A batch is a
function of the seed and the step alone, so a resumed run sees what an uninterrupted one would have seen.

With `--steps`, the same seed, device and number of threads give the same weights; with `--minutes` the clock decides.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .._errors import OptionError
from . import NAMES, folder, tokenizer, world

if TYPE_CHECKING:
    import torch
    from transformers import MistralForCausalLM, PreTrainedTokenizerFast

CONTEXT = 2048  # tokens: the longest sequence trained on
LENGTHS = ((0.0, 256), (0.65, 512), (0.9, CONTEXT))  # from this share of the budget on, sequences of so many tokens
WINDOW = 512  # tokens: held-out text is scored in disjoint windows of this length
CHECKPOINT = "training.pt"
MINUTES = 41  # the budget of the shipped weights


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What distinguishes student from teacher: sizes of the model, and the peak learning rate that suits them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    rate: float


SHAPES = {
    "student": Shape(hidden=256, intermediate=640, layers=8, heads=8, kv_heads=4, rate=2e-3),
    "teacher": Shape(hidden=384, intermediate=1024, layers=8, heads=12, kv_heads=4, rate=1.5e-3),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train: so many steps or so many minutes of training time, one of the two.

    Raises OptionError if neither or both are given, or the number is not positive.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise OptionError(f"steps={self.steps!r} and minutes={self.minutes!r}: give one of the two")
        if not (self.steps or self.minutes or 0) > 0:
            raise OptionError(f"steps={self.steps!r}, minutes={self.minutes!r}: the budget must be more than 0")

    def used(self, step: int, seconds: float) -> float:
        """The share of the budget that `step` finished steps and `seconds` of training have used, at most 1."""
        return min(1.0, step / self.steps if self.steps else seconds / (60 * self.minutes))


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: share of the budget used (0 to 1), training loss and sometimes validation loss (nat)."""

    step: int
    tokens: int
    seconds: float
    share: float
    loss: float
    validation: float | None


def build(shape: Shape, vocabulary: "PreTrainedTokenizerFast", *, seed: int) -> "MistralForCausalLM":
    """An untrained float32 model of the shape; the same seed gives the same weights, and no global state is touched."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=len(vocabulary),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=CONTEXT,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MistralForCausalLM(config)


def batch(vocabulary: "PreTrainedTokenizerFast", *, seed: int, step: int, rows: int, length: int) -> "torch.Tensor":
    """Packed training documents, ids of shape (rows, length + 1).

    Documents follow each other after `</s><s>` or after an empty line, in turn: the model sees ends and joined text.
    """
    import torch

    documents = world.stream("train", 1_000_000 * (seed + 1) + step)
    separators = itertools.cycle(("\n\n", tokenizer.EOS + tokenizer.BOS))
    text, ids, needed = tokenizer.BOS, [], rows * (length + 1)
    while len(ids) < needed:
        for _ in range(1 + (needed - len(ids)) // 150):  # a document has about 150 tokens
            text += next(documents) + next(separators)
        ids = vocabulary.encode(text, add_special_tokens=False, verbose=False)
    return torch.tensor(ids[:needed]).view(rows, length + 1)


def evaluate(
    model: "torch.nn.Module", vocabulary: "PreTrainedTokenizerFast", split: str, *, limit: int | None = None
) -> float:
    """Mean loss in nat per token over disjoint windows of the split's documents, joined by empty lines.

    The first token of each window is not predicted, and a last window that is not full is left out.
    """
    import torch

    ids = vocabulary.encode("\n\n".join(world.texts(split, limit=limit)), add_special_tokens=False, verbose=False)
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW).to(model.device)
    with torch.inference_mode():
        losses = [_loss(model, rows) for rows in windows.split(8)]
    return sum(float(loss) * len(rows) for loss, rows in zip(losses, windows.split(8), strict=True)) / len(windows)


def _loss(model: "torch.nn.Module", ids: "torch.Tensor") -> "torch.Tensor":
    import torch

    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train(
    shape: Shape,
    budget: Budget,
    *,
    out: Path,
    resume: bool = False,
    seed: int = 0,
    device: str = "cpu",
    vocabulary: "PreTrainedTokenizerFast | None" = None,
    tokens_per_step: int = 1024,
    lengths: tuple[tuple[float, int], ...] = LENGTHS,
    save_minutes: float = 5.0,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Train a model of the shape, write it to the folder `out` in the format of transformers, and return its card.

    Every `save_minutes` the folder is brought up to date, and a checkpoint beside the weights allows `resume`; an
    interrupt (Ctrl-C) writes the checkpoint too and is raised again. The checkpoint goes when training is done.
    Without a `vocabulary` the tokenizer is trained first.

    Raises OptionError before any work if the folder cannot be written, there is nothing to resume, what is there is of
    another shape, seed or world, or the device is absent.
    """
    import torch

    _check(out, resume, device)
    vocabulary = vocabulary or tokenizer.build(world.texts("train", limit=4000), context=CONTEXT)
    model = build(shape, vocabulary, seed=seed).to(device).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=shape.rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    identity = {"shape": asdict(shape), "seed": seed, "world_sha256": world.digest()}
    step, tokens, before = _restore(out / CHECKPOINT, identity, model, optimizer) if resume else (0, 0, 0.0)
    started = saved = time.monotonic()

    def seconds() -> float:
        return before + time.monotonic() - started

    def save() -> None:
        state = {"identity": identity, "step": step, "tokens": tokens, "seconds": seconds()}
        weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        beside = out / (CHECKPOINT + ".new")
        torch.save(state | weights, beside)
        os.replace(beside, out / CHECKPOINT)

    def export(*, finished: bool) -> dict[str, Any]:
        facts = {**identity, "finished": finished, "steps": step, "tokens": tokens, "seconds": round(seconds())}
        return _export(model, vocabulary, out, facts)

    try:
        while (share := budget.used(step, seconds())) < 1:
            length = next(length for start, length in reversed(lengths) if share >= start)
            rows = max(1, tokens_per_step // length)
            ids = batch(vocabulary, seed=seed, step=step, rows=rows, length=length).to(device)
            for group in optimizer.param_groups:
                group["lr"] = shape.rate * _schedule(share)
            with torch.autocast("cuda", torch.bfloat16) if model.device.type == "cuda" else nullcontext():
                loss = _loss(model, ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + ids[:, 1:].numel()
            validation = None
            if time.monotonic() - saved > 60 * save_minutes:
                save()
                validation = export(finished=False)["validation"]["loss"]
                saved = time.monotonic()
            now = {"step": step, "tokens": tokens, "seconds": seconds(), "share": share}
            report(Progress(**now, loss=loss.item(), validation=validation))
    except KeyboardInterrupt:
        save()
        raise
    card = export(finished=True)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return card


def _schedule(share: float) -> float:
    """The factor on the peak learning rate: linear warm-up over 2 % of the budget, then a cosine down to a tenth."""
    return min(1.0, share / 0.02 + 0.01) * (0.55 + 0.45 * math.cos(math.pi * share))


def _check(out: Path, resume: bool, device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise OptionError(f"device={device!r} is no device of torch; take cpu or cuda") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise OptionError(
            f"device={device!r} is not there; take {'cpu or cuda' if torch.cuda.is_available() else 'cpu'}"
        )
    if resume and not (out / CHECKPOINT).is_file():
        raise OptionError(f"nothing to resume: {out / CHECKPOINT} does not exist; start without --resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OptionError(
            f"out={str(out)!r} is not a folder that can be written: {error.strerror}; choose another"
        ) from error


def _restore(
    path: Path, identity: dict[str, Any], model: "torch.nn.Module", optimizer: "torch.optim.Optimizer"
) -> tuple[int, int, float]:
    """Load a checkpoint into model and optimizer; returns steps, tokens and seconds so far."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise OptionError(
            f"{path} is of {state['identity']}, not of {identity}; start without --resume or choose another folder"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["tokens"], state["seconds"]


def _export(
    model: "MistralForCausalLM", vocabulary: "PreTrainedTokenizerFast", out: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write weights in bfloat16, configuration, tokenizer and card; the scores are those of the rounded weights."""
    import torch

    rounded = build(Shape(**facts["shape"]), vocabulary, seed=0)
    rounded.load_state_dict(model.state_dict())
    rounded = rounded.to(torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        rounded.save_pretrained(scratch)
        vocabulary.save_pretrained(scratch)
        weights = hashlib.sha256((Path(scratch) / "model.safetensors").read_bytes()).hexdigest()
        rounded = rounded.float().to(model.device).eval()
        card = {
            **facts,
            "parameters": sum(p.numel() for p in model.parameters()),
            "validation": _score(rounded, vocabulary, "validation"),
            "weights_sha256": weights,
            "torch": torch.__version__,
        }
        if facts["finished"]:
            card["test"] = _score(rounded, vocabulary, "test")
        (Path(scratch) / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        for path in sorted(Path(scratch).iterdir()):
            path.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(path, out / path.name)
    return card


def _score(model: "torch.nn.Module", vocabulary: "PreTrainedTokenizerFast", split: str) -> dict[str, float]:
    loss = evaluate(model, vocabulary, split)
    return {"loss": round(loss, 4), "perplexity": round(math.exp(loss), 3)}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 bad options, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.reference.train", description="Train the embedded reference."
    )
    parser.add_argument("name", choices=NAMES)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=float, help=f"training time, resumed time included (default: {MINUTES}, as shipped)"
    )
    length.add_argument("--steps", type=int, help="steps of 1,024 to 2,048 tokens; reproducible where --minutes is not")
    parser.add_argument("--out", type=Path, help="folder to write (default: the one that is shipped)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    try:
        minutes = MINUTES if options.minutes is options.steps is None else options.minutes
        budget = Budget(steps=options.steps, minutes=minutes)
        with _Display() as display:
            card = train(
                SHAPES[options.name],
                budget,
                out=options.out or folder(options.name),
                resume=options.resume,
                seed=options.seed,
                device=options.device,
                report=display,
            )
    except OptionError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; go on with --resume", file=sys.stderr)
        return 130
    print(json.dumps(card, indent=2))
    return 0


class _Display:
    """A progress bar on a terminal, else a line every 30 seconds."""

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
        self._bar = Bar(console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("training", total=1.0)
        self._next = 0.0
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        text = f"step {progress.step}  loss {progress.loss:.3f}  {progress.tokens / progress.seconds:.0f} tokens/s"
        self._bar.update(self._task, completed=progress.share, description=text)
        if progress.validation is not None:
            self._console.print(f"{progress.share:6.1%}  {text}  validation {progress.validation:.4f}")
        elif not self._console.is_terminal and progress.seconds >= self._next:
            self._console.print(f"{progress.share:6.1%}  {text}")
            self._next = progress.seconds + 30


if __name__ == "__main__":
    sys.exit(main())
