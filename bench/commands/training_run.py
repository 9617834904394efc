"""One training of the embedded reference under way: its steps, checkpoint and log."""

import json
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import OptionError
from bench.reference.batches import batch
from bench.reference.model import Shape

if TYPE_CHECKING:
    import torch

TOKENS = 1024  # in a step
WARM_UP = 100  # steps
DECAY = 0.5  # share of the steps over which the rate falls to zero
CHECKPOINT = "training.pt"
LOG = "log.jsonl"


def loss(
    model: "torch.nn.Module", ids: "torch.Tensor", following: "torch.Tensor", weights: "torch.Tensor"
) -> "torch.Tensor":
    """The weighted mean loss (nat); the head is computed only where there is weight. Shapes: (rows, length)."""
    import torch

    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    learnt = weights > 0
    each = torch.nn.functional.cross_entropy(model.lm_head(hidden[learnt]).float(), following[learnt], reduction="none")
    return (each * weights[learnt]).sum() / weights.sum()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: steps done of `steps`, training loss (nat), and the scores where they were just taken."""

    step: int
    steps: int
    tokens: int
    seconds: float
    loss: float
    scores: dict[str, float] | None


class Run:
    """A training under way.

    Attributes:
        step, tokens: done so far.
        loss: smoothed over the steps.
        late: the loss on held-out text after nine tenths of the steps.
    """

    def __init__(self, shape: Shape, model: Any, vocabulary: Any, identity: dict[str, Any], out: Path):
        import torch

        self._shape, self._model, self._vocabulary, self._identity, self._out = shape, model, vocabulary, identity, out
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=shape.rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.step, self.tokens, self.loss, self.late = 0, 0, 0.0, None
        self._before, self._started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent so far, those before a resumption included."""
        return self._before + time.monotonic() - self._started

    def restore(self) -> None:
        """Go on where the checkpoint was written. Raises OptionError for one of another training."""
        path = self._out / CHECKPOINT
        self.step, self.tokens, self._before, self.loss, self.late = read_state(
            path, self._identity, self._model, self._optimizer
        )
        self._started = time.monotonic()

    def save(self) -> None:
        """Bring the checkpoint up to date."""
        state = {"identity": self._identity, "step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        weights = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        write_state(state | {"loss": self.loss, "late": self.late} | weights, self._out / CHECKPOINT)

    def take(self, steps: int, share: float, length: int) -> None:
        """One step of `steps`, at `share` of the curriculum, on rows of `length` tokens."""
        import torch

        device, seed = self._model.device, self._identity["seed"]
        parts = batch(self._vocabulary, seed=seed, step=self.step, share=share, rows=max(1, TOKENS // length),
                      length=length)  # fmt: skip
        for group in self._optimizer.param_groups:
            group["lr"] = self._shape.rate * rate_at(self.step, steps)
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
            now = loss(self._model, *(part.to(device) for part in parts))
        now.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.loss = 0.98 * self.loss + 0.02 * now.item() if self.step else now.item()
        self.step, self.tokens = self.step + 1, self.tokens + parts[0].numel()

    def progress(self, steps: int, scores: dict[str, float] | None) -> Progress:
        """Where it is, of so many steps."""
        return Progress(step=self.step, steps=steps, tokens=self.tokens, seconds=self.seconds, loss=self.loss,
                        scores=scores)  # fmt: skip

    def log(self, scores: dict[str, float] | None) -> None:
        """A line of JSON: where the training is, its loss, and its scores where there are some."""
        row = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds), "loss": round(self.loss, 4)}
        with (self._out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | ({"scores": scores} if scores else {})) + "\n")


def rate_at(step: int, steps: int) -> float:
    """The factor on the peak rate of a step (counted from 0)."""
    left = (steps - step) / max(1, int(DECAY * steps))
    return min(1.0, (step + 1) / WARM_UP, left * left)


def write_state(state: dict[str, Any], path: Path) -> None:
    """Save a state so that the file is there whole or not at all."""
    import torch

    beside = path.with_suffix(".new")
    torch.save(state, beside)
    os.replace(beside, path)


def read_state(
    path: Path, identity: dict[str, Any], model: "torch.nn.Module", optimizer: "torch.optim.Optimizer"
) -> tuple[int, int, float, float, float | None]:
    """Load a checkpoint into model and optimizer.

    Returns steps, tokens and seconds so far, the smoothed loss, and the loss on held-out text after nine tenths.
    """
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise OptionError(
            f"{path} belongs to {state['identity']}, not to {identity}; start without --resume, or choose another "
            "folder"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["tokens"], state["seconds"], state["loss"], state["late"]
