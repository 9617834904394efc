"""Recovery on a downstream task: adapters trained on the frozen compressed weights.

Paper: [E], phase 2: every compressed model is fine-tuned on the downstream task (LoRA; QLoRA, arXiv 2305.14314, where
weights are packed) and measured again. Its control is `fp16-recover`, the same on the uncompressed model.
Minimised is the cross-entropy of the answers' tokens, nat per token, by `_training.train` with alpha 0: in fp32, or
with `bf16` under autocast. Texts are examples one behind the other, as many as go into `sequence_length`.
What is left: floating-point weights take the adapters in, rounded once to their dtype, and weights that are zero stay
zero (`_lora`); beside packed codes, which keep every bit, adapters are stored in the dtype of the layer. `merge=all`
rounds packed layers anew instead, on their own grid; the report has what that loses of each.
Departures: [E] does not say how it fine-tunes; adapters on all linear layers are QLoRA's, rank, steps and learning rate
what works on the embedded reference. The learning rate falls linearly (QLoRA keeps it).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compression import architectures, layers, training
from compression.errors import RecipeError, TrainingError
from compression.layers.report import LEFT_ALONE, LayerReport
from compression.methods.base import TrainingMethod, method
from compression.recipes.registry import spell
from compression.training.settings import LINEARS, QV, LoraSettings, Objective, Settings

if TYPE_CHECKING:
    from torch import nn

    from compression.methods.base import Context


@method("recover", takes=("dense", "packed", "sparse"), leaves=None, needs=("training",))
@dataclass(frozen=True, kw_only=True)
class Recover(TrainingMethod):
    """Train low-rank adapters on a downstream task, the compressed weights frozen (LoRA, QLoRA)."""

    rank: int = 16  # of the adapters
    alpha: float = 32.0  # the adapters' product is scaled by alpha / rank
    targets: Literal["all", "qv"] = "all"  # linear layers with adapters: all, or those of queries and values
    dropout: float = 0.0  # share of the inputs of the adapters that is left out in training
    samples: int | None = None  # examples of the task, at most; none: all that there are
    sequence_length: int = 512  # tokens of a text
    epochs: int = 1  # passes over the examples
    learning_rate: float = 1e-3  # at the start of its decay
    warmup: float = 0.04  # share of the steps in which the learning rate rises
    batch: int = 2  # texts of a forward pass
    accumulation: int = 1  # forward passes of a step
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"  # adamw_8bit: that of bitsandbytes
    bf16: bool = False  # whether to multiply in bf16
    save_steps: int = 100  # steps between two checkpoints
    patience: int = 0  # stop after this many epochs without a lower loss on a held-out tenth of the texts; 0: never
    merge: Literal["exact", "all"] = "exact"  # exact: into dense weights alone; all: packed weights are rounded anew

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise RecipeError(f"recover(samples={self.samples}): must be at least 1, or none for all")
        if self.sequence_length < 2:
            raise RecipeError(f"recover(sequence_length={self.sequence_length}): must be at least 2")
        self.settings(seed=0)  # which checks the others
        self.adapters(seed=0)

    def settings(self, *, seed: int) -> Settings:
        return Settings(
            epochs=self.epochs, learning_rate=self.learning_rate, batch=self.batch, accumulation=self.accumulation,
            clip=1.0, warmup=self.warmup, optimizer=self.optimizer, bf16=self.bf16, save_steps=self.save_steps,
            patience=self.patience, seed=seed,
        )  # fmt: skip

    def adapters(self, *, seed: int) -> LoraSettings:
        return LoraSettings(
            rank=self.rank, alpha=self.alpha, dropout=self.dropout, seed=seed,
            targets=LINEARS if self.targets == "all" else QV,
        )  # fmt: skip

    @property
    def downstream(self) -> bool:
        return True

    def reshape(self, model: "nn.Module") -> "nn.Module":
        """Raises LayerError: a packed layer has an adapter already, or losses cannot be computed on the model."""
        super().reshape(model)
        settings = self.adapters(seed=0)
        for block in architectures.decoder.decoder_blocks(model):
            for name, layer in block.linears():
                if name.rsplit(".", 1)[-1] not in settings.targets:
                    continue
                training.adapters.check_free(name, layer)
                if isinstance(layer, layers.linear.Linear) and not layer.exact and self.merge == "exact":
                    rows, cols = layer.weight_part.shape
                    scale, dtype = self.alpha / self.rank, str(layer.dtype).removeprefix("torch.")
                    adapter = layers.low_rank.LowRank.empty(rows, cols, rank=self.rank, scale=scale, dtype=dtype)
                    block.replace(name, layer.with_weight(*layer.weight_part.summands, adapter))
        return model

    def apply(self, model: "nn.Module", context: "Context") -> "nn.Module":
        """Raises TrainingError: there are too few examples for a step, one is too long, or the loss is not finite."""
        assert context.downstream is not None and context.folder is not None
        architectures.cuts.check_weights(model)
        texts = context.downstream.texts(
            context.tokenizer, samples=self.samples, length=self.sequence_length, seed=context.seed
        )
        if (highest := int(texts.ids.max())) >= model.config.vocab_size:  # type: ignore[union-attr, operator]
            raise TrainingError(f"the downstream task {context.downstream.name} holds token id {highest}; the base has "
                                f"a vocabulary of {model.config.vocab_size}")  # fmt: skip
        adapters = training.adapters.attach(model, self.adapters(seed=context.seed), keep_zeros=context.pruned)
        trained = training.trainer.train(
            model, texts, Objective(alpha=0, temperature=1), self.settings(seed=context.seed),
            context.folder / "training", progress=context.progress,
        )  # fmt: skip
        context.trained.append(trained)
        lost = training.adapters.merge(model, packed=self.merge == "all")
        first, last = trained.losses[0], trained.losses[-1]
        learnt = (f"{spell(self)}: {len(trained.losses)} steps on {texts.examples} examples of "
                  f"the task {context.downstream.name}, loss {first:.3g} to {last:.3g} nat")  # fmt: skip
        for block in architectures.decoder.decoder_blocks(model):
            for name, layer in block.linears():
                if name not in adapters:
                    context.report.append(LayerReport(name, "kept", LEFT_ALONE))
                elif layer is adapters[name]:
                    context.report.append(LayerReport(name, "replaced", f"{learnt}; beside the weights, which stay"))
                else:
                    share = f", and rounding moved that by {lost[name]:.3g} of the adapter's norm"
                    context.report.append(LayerReport(name, "replaced", f"{learnt}; merged{share}"))
        return model
