"""The steps of a plan on their way through the blocks of a model, for both runners: in memory and into a folder."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from compression.architectures import decoder, embeddings
from compression.architectures.table import NORMS, architecture_of
from compression.calibration import capture
from compression.engine.plan import Plan
from compression.engine.shapes import thin_calibration
from compression.layers.report import LEFT_ALONE, LayerReport
from compression.methods.base import Context, Progress
from compression.recipes.recipe import Step
from compression.workers import ALONE, Workers


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
    inputs: capture.Inputs | None = None

    @property
    def ids(self) -> Tensor | None:
        """Token ids (samples, length) for a step that reads inputs."""
        return self.context.ids

    def enter(self, model: nn.Module, at: int = 0, hidden: list[Tensor] | None = None) -> None:
        """Stand before block `at`, with the hidden states that reached it; at the first, they come from the text.

        Of several processes the first alone has them.
        """
        if self.ids is not None and at <= self.last:
            self.inputs = (
                capture.Inputs.of_first_block(model, self.ids, self.context.workers)
                if at == 0
                else capture.Inputs.of_block(at, hidden, model, self.ids, self.context.workers)
            )

    def take(self, index: int, block: decoder.Block) -> None:
        """Compress block number `index`."""
        if self.step is None:
            decoder.make_dense(block.module)
        elif _changes(self.step, block):
            seen = None if self.inputs is None else capture.Seen(block, self.inputs)
            self.step.method.apply_block(block, seen, self.context)  # type: ignore[attr-defined]
        else:
            self.context.report += [LayerReport(name, "kept", LEFT_ALONE) for name, _ in block.linears()]
        if index >= self.last:
            self.inputs = None
        elif self.inputs is not None:
            self.inputs.advance(block)


def make_contexts(
    plan: Plan, device: str, seed: int, progress: Progress | None, workers: Workers = ALONE
) -> list[Context]:
    """A context for each step of a plan; the calibration text of those that need some is read.

    Raises:
        CalibrationError: there is too little of it.
    """
    tokenizer, vocabulary = plan.source.tokenizer, plan.base.config.vocab_size  # type: ignore[union-attr]
    contexts, pruned = [], False
    for step, _ in plan.schedule:
        context = Context(step, device, seed, progress or _silent, tokenizer=tokenizer, pruned=pruned, workers=workers)
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
        if context.step is not None:
            context.step = context.step.on([block.name for block in blocks])
        step = context.step
        last = max((i for i, block in enumerate(blocks) if step is None or _changes(step, block)), default=-1)
        passes.append(Pass(step, context, last))
    return passes


def full_report(report: Iterable[LayerReport], model: nn.Module) -> tuple[LayerReport, ...]:
    """What the steps reported, and the parts of the model that none of them took."""
    report = list(report)
    if report:
        reported = {entry.name for entry in report}
        parts = dict(zip(architecture_of(model).around, ("embeddings", "output head", "norms"), strict=True))
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
        embeddings.unpack(model)
    elif getattr(step.method, "embeddings", 16) == 8:
        embeddings.pack(model)
        layers = {name: model.get_submodule(name) for name in architecture_of(model).around if name != NORMS}
        return [
            LayerReport(name, "replaced", f"{step}, {embeddings.GRID.words}, kernel {layer.kernel_name()}")  # type: ignore[operator]
            for name, layer in layers.items()
        ]
    return []


def _changes(step: Step, block: decoder.Block) -> bool:
    return any(step.for_layer(name) is not None for name, _ in block.linears())


def _silent(done: int, total: int, what: str) -> None:
    pass
