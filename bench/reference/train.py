"""Train the embedded reference: `python -m bench.reference.train student|teacher`.

The student is a causal language model of the Mistral architecture, trained from nothing on `lessons`, with the loss
over the words that a lesson marks. AdamW; the rate rises over the first steps, stays, and falls in a line to zero over
the last quarter (warm-up, stable, decay: arXiv 2405.18392). The mixture of lessons changes over the first `curriculum`
steps and then stays; sequences grow longer with it, and the last few fill the whole context.

The teacher grows out of the student as it was at the end of its curriculum: behind every layer a new one is put whose output
matrices are zero, so that the grown model computes what the student did (function-preserving growth: Net2Net, arXiv
1511.05641; identity blocks: LLaMA Pro, arXiv 2401.02415). It then trains on, over another sequence of lessons.

A step is a function of the seed and its number alone, so a resumed run sees what an uninterrupted one would have seen;
the same steps, seed, device and number of threads give the same weights. The number of steps may be changed on resuming
for as long as the rate has not begun to fall.
"""

import argparse
import hashlib
import json
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
from . import NAMES, folder, lessons, score, tokenizer, world

if TYPE_CHECKING:
    import torch
    from transformers import MistralForCausalLM, PreTrainedTokenizerFast

CONTEXT = 2048  # tokens: the longest input that is declared
TOKENS = 1024  # in a step
LENGTHS = ((0.0, 256), (lessons.LONG, 512))  # from this share of the curriculum on, sequences of so many tokens
LONG = 20  # the last steps read one sequence of the whole context each
WARM_UP = 100  # steps
DECAY = 0.25  # share of the steps over which the rate falls to zero
CHECKPOINT, TAUGHT, LOG = "training.pt", "taught.pt", "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What distinguishes student from teacher: sizes of the model, the rate that suits them, the curriculum."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    rate: float
    curriculum: int  # the steps over which the mixture of lessons changes; 0: a teacher's mixture throughout


SHAPES = {
    "student": Shape(hidden=256, intermediate=512, layers=8, heads=8, kv_heads=4, rate=1.5e-3, curriculum=2000),
    "teacher": Shape(hidden=256, intermediate=512, layers=16, heads=8, kv_heads=4, rate=8e-4, curriculum=0),
}
STEPS = {"student": 6000, "teacher": 4000}  # of the shipped weights


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: steps done of `steps`, training loss (nat), and the scores where they were just taken."""

    step: int
    steps: int
    tokens: int
    seconds: float
    loss: float
    scores: dict[str, float] | None


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
        model = MistralForCausalLM(config)
    with torch.no_grad():
        _begin_by_copying(model, torch.Generator().manual_seed(seed))
    return model


def _begin_by_copying(model: "MistralForCausalLM", generator: "torch.Generator") -> None:
    """Let the first two layers begin as what all reading rests on: heads that look back, and heads that copy.

    Copying out of a text needs a head that looks at the token before, and one in a later layer that finds where this
    token stood before and says what followed (induction heads, arXiv 2209.11895). Neither is of use without the other,
    which is why a small budget ends before both appear. Here

    - a channel of the embeddings, the same for all tokens, makes keys of layer 0 that depend on the place alone, in the
      rotary pairs of short wavelength; queries are these turned back, so that heads look 1, 1, 2, 3 ... tokens back;
    - the first of them writes a projection of what it sees; in layer 1 one head of each group compares this with the
      same projection of its own token, in the rotary pairs of long wavelength, and copies a part of what it finds;
    - the output matrix begins as the embeddings.

    All of it is trained on like any other weight.
    """
    import torch

    config, first, second = model.config, model.model.layers[0].self_attn, model.model.layers[1].self_attn
    hidden, size, groups = config.hidden_size, config.head_dim, config.num_key_value_heads
    pairs, heads = size // 2, config.num_attention_heads

    def directions(count: int) -> torch.Tensor:
        """Orthonormal rows that leave out the constant channel, (count, hidden)."""
        square = torch.linalg.qr(torch.randn(hidden - 1, count, generator=generator))[0]
        return torch.nn.functional.pad(square.T, (1, 0))

    embeddings = model.model.embed_tokens.weight
    embeddings *= 0.3 / config.initializer_range
    embeddings[:, 0] = 2.4
    model.lm_head.weight.copy_(embeddings / 15)
    model.lm_head.weight[:, 0] = 0
    seen, written, copied = directions(size), directions(size), directions(min(size * groups, hidden - 1))

    angles = 10000.0 ** (-torch.arange(6) / pairs)
    keys, queries = (w.weight.view(-1, size, hidden) for w in (first.k_proj, first.q_proj))
    keys[:, :6, 0] = 0.9
    for head in range(heads):
        queries[head, :6, 0] = 0.9 * torch.cos(max(1, head) * angles)
        queries[head, pairs : pairs + 6, 0] = -0.9 * torch.sin(max(1, head) * angles)
    first.v_proj.weight[:size] = seen
    first.o_proj.weight[:, :size] = 0.9 * written.T

    long = torch.arange(9 * size // 32, pairs)
    long = torch.cat([long, long + pairs])
    keys, queries = (w.weight.view(-1, size, hidden) for w in (second.k_proj, second.q_proj))
    for group in range(groups):
        some, head = torch.randperm(size, generator=generator)[: len(long)], group * heads // groups
        keys[group, long], queries[head, long] = 3 * written[some], 3 * seen[some]
        part = copied[group * size : (group + 1) * size]
        second.v_proj.weight[group * size : group * size + len(part)] = part
        second.o_proj.weight[:, head * size : head * size + len(part)] = 2.4 * part.T


def grow(model: "MistralForCausalLM", source: Path) -> None:
    """Give a fresh model with a multiple of the layers the weights in `source` (a folder), computing the same function.

    Layer i of the source becomes the first of its group; the others of the group add nothing to the stream at first.

    Raises OptionError if the folder has neither a state at the end of the curriculum nor weights, or they are of other widths.
    """
    import torch
    from safetensors.torch import load_file

    if (source / TAUGHT).is_file():
        given = torch.load(source / TAUGHT, map_location="cpu", weights_only=True)
    elif (source / "model.safetensors").is_file():
        given = load_file(source / "model.safetensors")
    else:
        raise OptionError(f"nothing to grow from: {source} has neither {TAUGHT} nor model.safetensors")
    layers = 1 + max(int(name.split(".")[2]) for name in given if name.startswith("model.layers."))
    group, rest = divmod(model.config.num_hidden_layers, layers)
    state = model.state_dict()
    for name, tensor in given.items():
        parts = name.split(".")
        if name.startswith("model.layers."):
            parts[2] = str(group * int(parts[2]))
        if rest or state[".".join(parts)].shape != tensor.shape:
            raise OptionError(f"{source} has {layers} layers and {name} of {tuple(tensor.shape)}: it cannot grow so")
        state[".".join(parts)] = tensor.float()
    model.load_state_dict(state)
    for number, layer in enumerate(model.model.layers):
        if number % group:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def batch(
    vocabulary: "PreTrainedTokenizerFast", *, seed: int, step: int, share: float, rows: int, length: int
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Lessons packed in rows: ids, the ids that follow, and the weights of those in the loss, (rows, length) each.

    A lesson ends with `</s>` and is never cut; of eight that wait, a row takes the first that still fits.
    """
    import torch

    draw = world.Draw("batch", seed, step)
    waiting: list[tuple[list[int], list[float]]] = []
    packed = []
    for _ in range(rows):
        ids: list[int] = []
        weights: list[float] = []
        while True:
            while len(waiting) < 8:
                waiting.append(_encode(vocabulary, lessons.lesson(draw, share)))
            fitting = [n for n, (more, _) in enumerate(waiting) if len(ids) + len(more) <= length + 1]
            if fitting:
                more, learn = waiting.pop(fitting[0])
                ids, weights = ids + more, weights + learn
            elif ids:
                break
            else:
                waiting.clear()  # lessons longer than a row
        room = length + 1 - len(ids)
        packed.append((ids + [vocabulary.pad_token_id] * room, weights + [0.0] * room))
    ids_, weights_ = torch.tensor([ids for ids, _ in packed]), torch.tensor([weights for _, weights in packed])
    return ids_[:, :-1], ids_[:, 1:], weights_[:, 1:]


def _encode(vocabulary: "PreTrainedTokenizerFast", lesson: lessons.Lesson) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in lesson:
        more = vocabulary.encode(text, add_special_tokens=False)
        ids, weights = ids + more, weights + [float(weight)] * len(more)
    return [*ids, vocabulary.eos_token_id], [*weights, 0.0]


def loss(
    model: "torch.nn.Module", ids: "torch.Tensor", following: "torch.Tensor", weights: "torch.Tensor"
) -> "torch.Tensor":
    """The weighted mean loss (nat); the head is computed only where there is weight. Shapes: (rows, length)."""
    import torch

    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    learnt = weights > 0
    each = torch.nn.functional.cross_entropy(model.lm_head(hidden[learnt]).float(), following[learnt], reduction="none")
    return (each * weights[learnt]).sum() / weights.sum()


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
    import torch
    from transformers import AutoTokenizer

    _check(out, resume, device, steps)
    if vocabulary is None and resume:
        vocabulary = AutoTokenizer.from_pretrained(out, local_files_only=True)
    vocabulary = vocabulary or tokenizer.build(lessons.samples(), context=CONTEXT)
    vocabulary.save_pretrained(out)
    model = build(shape, vocabulary, seed=seed)
    if source and not resume:
        grow(model, source)
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=shape.rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    identity = {"shape": asdict(shape), "seed": seed, "grown": source is not None, "world_sha256": world.digest()}
    step, tokens, before, smooth = 0, 0, 0.0, None
    if resume:
        step, tokens, before, smooth = _restore(out / CHECKPOINT, identity, model, optimizer)
    started = time.monotonic()

    def seconds() -> float:
        return before + time.monotonic() - started

    def save() -> None:
        state = {"identity": identity, "step": step, "tokens": tokens, "seconds": seconds(), "loss": smooth}
        weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        _write(state | weights, out / CHECKPOINT)

    try:
        while step < steps:
            if step == shape.curriculum > 0:
                _write(model.state_dict(), out / TAUGHT)
            share = _share(step, shape.curriculum)
            length = next(length for start, length in reversed(lengths) if share >= start)
            length = CONTEXT if steps - step <= long else length
            rows = max(1, TOKENS // length)
            parts = batch(vocabulary, seed=seed, step=step, share=share, rows=rows, length=length)
            for group in optimizer.param_groups:
                group["lr"] = shape.rate * _schedule(step, steps)
            with torch.autocast("cuda", torch.bfloat16) if model.device.type == "cuda" else nullcontext():
                now = loss(model, *(part.to(device) for part in parts))
            now.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + parts[0].numel()
            smooth = now.item() if smooth is None else 0.98 * smooth + 0.02 * now.item()
            if step % save_every == 0:
                save()
            found = None
            if step % score_every == 0:
                found = _validation(model, vocabulary)
            if step % 20 == 0 or found:
                with (out / LOG).open("a", encoding="utf-8") as log:
                    row = {"step": step, "tokens": tokens, "seconds": round(seconds()), "loss": round(smooth, 4)}
                    log.write(json.dumps(row | ({"scores": found} if found else {})) + "\n")
            report(Progress(step=step, steps=steps, tokens=tokens, seconds=seconds(), loss=smooth, scores=found))
    except KeyboardInterrupt:
        save()
        raise
    save()
    return _export(model, vocabulary, out, {**identity, "steps": step, "tokens": tokens, "seconds": round(seconds())})


def _validation(model: "torch.nn.Module", vocabulary: "PreTrainedTokenizerFast") -> dict[str, float]:
    model.eval()
    found = score.scores(model, vocabulary, split="validation", limit=40)
    model.train()
    return {name: round(one.value, 4) for name, one in found.items()}


def _share(step: int, curriculum: int) -> float:
    """Where a step is in the curriculum, 0 to 1; without one, a teacher's place."""
    return min(1.0, step / curriculum) if curriculum else lessons.TEACHER


def _schedule(step: int, steps: int) -> float:
    """The factor on the peak rate of a step (counted from 0)."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1, int(DECAY * steps)))


def _write(state: dict[str, Any], path: Path) -> None:
    """Save a state so that the file is there whole or not at all."""
    import torch

    beside = path.with_suffix(".new")
    torch.save(state, beside)
    os.replace(beside, path)


def _check(out: Path, resume: bool, device: str, steps: int) -> None:
    import torch

    if steps < 1:
        raise OptionError(f"steps={steps} must be more than 0")
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
) -> tuple[int, int, float, float]:
    """Load a checkpoint into model and optimizer; returns steps, tokens and seconds so far, and the smoothed loss."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise OptionError(
            f"{path} is of {state['identity']}, not of {identity}; start without --resume or choose another folder"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["tokens"], state["seconds"], state["loss"]


def _export(
    model: "MistralForCausalLM", vocabulary: "PreTrainedTokenizerFast", out: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write weights in bfloat16, configuration, tokenizer and the facts of the training."""
    import torch

    rounded = build(Shape(**facts["shape"]), vocabulary, seed=0)
    rounded.load_state_dict(model.state_dict())
    rounded = rounded.to(torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        rounded.save_pretrained(scratch)
        vocabulary.save_pretrained(scratch)
        weights = hashlib.sha256((Path(scratch) / "model.safetensors").read_bytes()).hexdigest()
        parameters = sum(p.numel() for p in model.parameters())
        facts = {**facts, "parameters": parameters, "weights_sha256": weights, "torch": torch.__version__}
        (Path(scratch) / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in sorted(Path(scratch).iterdir()):
            path.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(path, out / path.name)
    return facts


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 bad options, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.reference.train", description="Train the embedded reference."
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--steps", type=int, help="default: as many as the shipped weights had")
    parser.add_argument("--out", type=Path, help="folder to write (default: the one that is shipped)")
    parser.add_argument(
        "--grow", type=Path, metavar="DIR", help="the student's folder a teacher grows from (default: the shipped one)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
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
        print("interrupted; go on with --resume", file=sys.stderr)
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
