"""The steps of a plan on their way through the blocks of a model, for both runners: in memory and into a folder."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compression.architectures import decoder
from compression.checkpoints import base
from compression.checkpoints.artefact import LEFT_ALONE, LayerReport
from compression.engine.plan import Plan
from compression.engine.shapes import thin_calibration
from compression.layers import embedding
from compression.recipes.recipe import Step
from compression.training.downstream import Downstream

Progress = Callable[[int, int, str], None]


@dataclass
class Context:
    """What a method may use while it runs.

    Attributes:
        step: the step that runs, with its settings per layer; None where stored layers are made dense.
        device: where the model is.
        seed: for everything random; methods make generators of their own from it.
        progress: called with (done, total, what).
        report: methods add one entry per layer.
        ids: token ids of calibration text, int64 (samples, length), on the device; None for a step that reads none.
        tokenizer: of the base; None if it has none.
        teacher: the base that a step learns from; None for a step that needs none.
        open_teacher: gives the model of that base after a recipe that reads no data, by its text.
        folder: where training keeps what later runs and those that go on after a kill can use.
        downstream: the task whose examples a step trains on; None for a step that trains on none.
        pruned: whether a step before made zeros, which are to stay.
        trained: runs of training that the step took; what they left in the folder is of no use once its result is kept.
    """

    step: Step | None
    device: str
    seed: int
    progress: Progress
    report: list[LayerReport] = field(default_factory=list)
    ids: Tensor | None = None
    tokenizer: Any = None
    teacher: base.BaseSource | None = None
    open_teacher: Callable[[str], nn.Module] | None = None
    folder: Path | None = None
    downstream: Downstream | None = None
    pruned: bool = False
    trained: list[Any] = field(default_factory=list)

    @property
    def calibration_tokens(self) -> int:
        """Tokens of calibration text that were read."""
        return 0 if self.ids is None else self.ids.numel()


@dataclass
class Pass:
    """One step of a schedule on its way through the blocks, which it takes in order.

    All steps can take a block before any takes the next: what a step makes of a block depends on what it made of those
    before, and on what the steps before it made of this one.

    Attributes:
        step: None makes stored layers dense again.
        context: of the step; holds the report.
        last: index of the last block that the step changes: to those behind it, inputs are of no use.
        inputs: what reaches the next block, from `enter` on and until the last block.
    """

    step: Step | None
    context: Context
    last: int
    inputs: decoder.Inputs | None = None

    @property
    def ids(self) -> Tensor | None:
        """Token ids (samples, length) for a step that reads inputs."""
        return self.context.ids

    def enter(self, model: nn.Module, at: int = 0, hidden: list[Tensor] | None = None) -> None:
        """Stand before block `at`, with the hidden states that reached it; at the first, they come from the text."""
        if self.ids is not None and at <= self.last:
            self.inputs = (
                decoder.Inputs.of_first_block(model, self.ids)
                if hidden is None
                else decoder.Inputs.of_block(at, hidden, model, self.ids)
            )

    def take(self, index: int, block: decoder.Block) -> None:
        """Compress block number `index`."""
        if self.step is None:
            decoder.make_dense(block.module)
        elif _changes(self.step, block):
            self.step.method.compress_block(block, self.inputs, self.context)  # type: ignore[attr-defined]
        else:
            self.context.report += [LayerReport(name, "kept", LEFT_ALONE) for name, _ in block.linears()]
        if index >= self.last:
            self.inputs = None
        elif self.inputs is not None:
            self.inputs.advance(block)


def make_contexts(plan: Plan, device: str, seed: int, progress: Progress | None) -> list[Context]:
    """A context for each step of a plan; the calibration text of those that need some is read.

    Raises:
        CalibrationError: there is too little of it.
    """
    tokenizer, vocabulary = plan.source.tokenizer, plan.base.config.vocab_size  # type: ignore[union-attr]
    contexts, pruned = [], False
    for step, _ in plan.schedule:
        context = Context(step, device, seed, progress or _silent, tokenizer=tokenizer, pruned=pruned)
        contexts.append(context)
        if step is None:
            continue
        context.teacher = plan.teacher
        context.downstream = plan.downstream if step.method.downstream else None
        pruned = pruned or step.method.info.leaves == "sparse"
        if step.method.calibration is not None:
            samples, length = step.method.calibration
            assert plan.calibration is not None  # the plan has refused
            context.ids = plan.calibration.tokens(
                tokenizer, samples=samples, length=length, seed=seed, vocabulary=vocabulary, ended=step.method.trains
            ).to(device)  # fmt: skip
    return contexts


def make_passes(contexts: Iterable[Context], model: nn.Module) -> list[Pass]:
    """Passes of block methods over a model, whose weights are not looked at."""
    passes, blocks = [], decoder.decoder_blocks(model)
    for context in contexts:
        step = context.step
        last = max((i for i, block in enumerate(blocks) if step is None or _changes(step, block)), default=-1)
        passes.append(Pass(step, context, last))
    return passes


def full_report(report: Iterable[LayerReport]) -> tuple[LayerReport, ...]:
    """What the steps reported, and the parts of the model that none of them took."""
    report = list(report)
    if report:
        reported = {entry.name for entry in report}
        parts = {"model.embed_tokens": "embeddings", "lm_head": "output head", "norms": "norms"}
        kept = {name: words for name, words in parts.items() if name not in reported}
        said = "embeddings, output head and norms" if len(kept) == len(parts) else " and ".join(kept.values())
        report += [LayerReport(name, "kept", f"{said} stay as they are") for name in kept]
    return tuple(report)


def notes_of(context: Context, model: nn.Module) -> list[str]:
    """What a reader of the result has to know of a step, as sentences; `model` is what the step takes."""
    if context.step is None:
        return []
    return list(filter(None, [thin_calibration(context.step, model, context.calibration_tokens)]))


def around_blocks(step: Step | None, model: nn.Module) -> list[LayerReport]:
    """Take a step to embeddings and head, behind what it reads of them; the report of that."""
    if step is None:
        embedding.unpack(model)
    elif getattr(step.method, "embeddings", 16) == 8:
        embedding.pack(model)
        layers = {name: model.get_submodule(name) for name in (embedding.EMBEDDINGS, embedding.HEAD)}
        return [
            LayerReport(name, "replaced", f"{step}, {embedding.GRID.words}, kernel {layer.kernel_name()}")  # type: ignore[operator]
            for name, layer in layers.items()
        ]
    return []


def _changes(step: Step, block: decoder.Block) -> bool:
    return any(step.for_layer(name) is not None for name, _ in block.linears())


def _silent(done: int, total: int, what: str) -> None:
    pass
