"""Removal of neurons of the MLP by a score of their weights and their activations.

Paper: [O], section 2.1.2, eq. 2. Score of neuron i of a layer = 0.5 w_i / max w + 0.5 a_i / max a, with w_i the sum of
|W_gate[i, :]| and |W_up[i, :]|, and a_i the mean of |h_i| over the calibration tokens, h = act(gate(x)) * up(x). The
lowest int(ratio n) of the n neurons of every layer go: rows of gate_proj and up_proj, columns of down_proj. All scores
are those of the model as it was before any was cut.
Departures: `round_to` (1 is the paper's, 11008 -> 7706) keeps a number of neurons that kernels take. The authors' code
takes 100 samples and the gate's output before the activation; built is what the paper says. With `finetune_samples`
(1500 in [O]) all weights are then trained on the language-model loss of as many texts, as the authors' code does: 2
epochs, learning rate 5e-5, batches of 2 x 4, AdamW. They take new text for it; here the scores are of its first
`samples`.
Limits: on a packed model gate and up keep their codes, and their scales unless these are themselves stored in 8 bits,
which is done again for what is left; down_proj, whose columns go one by one, is packed again by rounding to nearest.
There is no fine-tuning of packed models.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compression import architectures, calibration, layers, training
from compression.errors import LayerError, RecipeError
from compression.layers.report import LEFT_ALONE, LayerReport
from compression.methods.base import ModelMethod, check_samples, method
from compression.recipes.registry import spell
from compression.training.settings import Objective, Settings

if TYPE_CHECKING:
    from torch import nn

    from compression.architectures.decoder import Block
    from compression.methods.base import Context

_FINETUNING = Settings(epochs=2, learning_rate=5e-5, batch=2, accumulation=4, clip=1.0)  # of the authors' code


@method("p", takes=("dense", "packed"), leaves=None, needs=("calibration",))
@dataclass(frozen=True, kw_only=True)
class P(ModelMethod):
    """Remove the neurons of every MLP that score lowest, by the size of their weights and of their activations."""

    ratio: float = 0.3  # share of the neurons that go
    round_to: int = 128  # what stays is a multiple of it, the nearest; 1 is the paper's
    samples: int = 500  # of calibration text
    sequence_length: int = 512  # tokens of each
    finetune_samples: int = 0  # texts of the fine-tuning behind it, 1500 in the paper; 0: none

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise RecipeError(f"p(ratio={self.ratio}): allowed are 0 to below 1; the paper takes 0.3")
        if self.round_to < 1:
            raise RecipeError(f"p(round_to={self.round_to}): must be at least 1, which is the paper's")
        texts = _FINETUNING.batch * _FINETUNING.accumulation
        if self.finetune_samples and self.finetune_samples < texts:
            raise RecipeError(f"p(finetune_samples={self.finetune_samples}): one step takes {texts} texts; allowed are "
                              f"0 and {texts} or more, the paper takes 1500")  # fmt: skip
        check_samples(self)

    @property
    def calibration(self) -> tuple[int, int] | None:
        samples = max(self.samples if self.ratio else 0, self.finetune_samples)
        return (samples, self.sequence_length) if samples else None

    @property
    def trains(self) -> bool:
        return self.finetune_samples > 0

    def keep(self, neurons: int) -> int:
        """How many of so many neurons stay: n - int(ratio n), as the nearest multiple of `round_to` up to n.

        Raises:
            LayerError: that is none.
        """
        exact = neurons - architectures.cuts.share_of(self.ratio, neurons)
        if exact == neurons:
            return neurons
        kept = min((2 * exact + self.round_to) // (2 * self.round_to), neurons // self.round_to) * self.round_to
        if kept in (0, neurons):
            raise LayerError(f"p(ratio={self.ratio}) leaves {exact} of {neurons} neurons, and round_to={self.round_to} "
                             f"makes that {kept}; give a smaller round_to, 1 is the paper's")  # fmt: skip
        return kept

    def reshape(self, model: "nn.Module") -> "nn.Module":
        import torch

        packed = [name for name, layer in architectures.decoder.stored_layers(model).items() if not layer.exact]
        if self.trains and packed:
            raise LayerError(f"p(finetune_samples={self.finetune_samples}) trains all weights, and those of "
                             f"{packed[0]} are packed; put p before the step that packs them")  # fmt: skip
        if self.trains:
            architectures.decoder.check_trainable(model)
        for block in architectures.decoder.decoder_blocks(model):
            kept = self._kept_of(block)
            if kept < block.neurons:
                architectures.cuts.keep_neurons(block, torch.arange(kept))
        return architectures.cuts.conform(model)

    def apply(self, model: "nn.Module", context: "Context") -> "nn.Module":
        """Raises LayerError: a weight is not finite, or groups of a packed layer cannot be cut."""
        import torch

        architectures.cuts.check_weights(model)
        blocks = architectures.decoder.decoder_blocks(model)
        ids = context.ids if self.ratio else None
        inputs = None if ids is None else calibration.capture.Inputs.of_first_block(model, ids[: self.samples])
        for i, block in enumerate(blocks):
            there, count = block.neurons, self._kept_of(block)
            what, changes = f"{spell(self)}: {count} of {there} neurons stay", {}
            if inputs is not None:
                seen = calibration.observers.Mean(there)
                inputs.advance(block, lambda stack, x, seen=seen: seen.add(x) if stack.of == "neurons" else None)
                if count < there:
                    kept = calibration.importance.neuron_score(block, seen.value()).argsort(
                        descending=True, stable=True
                    )[:count]
                    before = dict(block.linears())
                    changes = architectures.cuts.keep_neurons(block, torch.sort(kept).values)
                    changes = {name: words + _same_scales(block, name, before[name]) for name, words in changes.items()}
            mlp = [block.full(path) for path in (*block.mlp.readers, *block.mlp.writers)]
            for name, _ in block.linears():
                if name in changes:
                    context.report.append(LayerReport(name, "replaced", what + changes[name]))
                else:
                    context.report.append(LayerReport(name, "kept", what if name in mlp else LEFT_ALONE))
            context.progress(i + 1, len(blocks), spell(self))
        model = architectures.cuts.conform(model)
        return self._finetuned(model, context) if self.trains else model

    def settings(self, *, seed: int) -> Settings:
        """Of the fine-tuning behind the cut."""
        return dataclasses.replace(_FINETUNING, seed=seed)

    def _finetuned(self, model: "nn.Module", context: "Context") -> "nn.Module":
        import copy

        assert context.ids is not None and context.folder is not None
        student, texts = copy.deepcopy(model), context.ids[: self.finetune_samples].cpu()
        settings = self.settings(seed=context.seed)
        trained = training.trainer.train(
            student, texts, Objective(alpha=0, temperature=1), settings, context.folder / "training",
            keep_zeros=context.pruned, progress=context.progress,
        )  # fmt: skip
        context.trained.append(trained)
        words = f"{len(trained.losses)} steps over {trained.tokens} tokens"
        context.report[:] = [LayerReport(e.name, "replaced", f"{e.detail}; {words}") for e in context.report]
        context.report += [LayerReport(name, "replaced", f"{spell(self)}: {words}")
                           for name in architectures.table.architecture_of(student).around]  # fmt: skip
        return student

    def _kept_of(self, block: "Block") -> int:
        try:
            return self.keep(block.neurons)
        except LayerError as error:
            raise LayerError(f"{block.full(block.mlp.module)}: {error}") from error


def _same_scales(block: "Block", name: str, before: "nn.Module") -> str:
    """Stores the scales of a layer in 8 bits again where they were before it was cut; what that did, in words."""
    after = dict(block.linears())[name]
    if not isinstance(after, layers.linear.Linear) or not isinstance(before, layers.linear.Linear):
        return ""
    first, *others = after.weight_part.summands
    stored = first.like(before.weight_part.summands[0])
    if stored is None:
        return ""
    again, was = after.with_weight(stored, *others), after.dequantize()
    moved = float((again.dequantize() - was).norm() / was.norm())
    block.replace(name, again)
    return f", then in 8 bits again, which moved its weights by {moved:.3g} of their norm"
