"""Distillation: a student learns from labels and from its teacher's softened outputs, all weights or adapters alone.

`kd`. Paper: [O], section 2.1.1, eq. 1: (1 - alpha) task + alpha T^2 KL(teacher || student), alpha 0.3, T 4.0, padding
masked out, vocabularies cut to the shared minimum, texts of 512 tokens; the authors' code: 2 epochs, learning rate
1e-4, batches of 2 x 4, clip 0.5.
Departures: the paper takes 10 % of UltraChat-200k, about 20,800 texts; `samples` is 500 by default. The teacher is not
compressed by default, the paper's is in 8 bits (`teacher_recipe=llm_int8`), which saves memory, not time. Documents are
packed into rows with the end of sequence between them instead of padded: no position is wasted, and one may attend to
the document before. What pruning set to zero stays zero.
`distilled`. Paper: [E], section 3.3.3 and listing 7: adapters of rank 64 on q_proj and v_proj (LoRA, arXiv 2106.09685;
scale 16 / 64, dropout 0.1), alpha 0.5, T 2.0, learning rate 2e-4, batches of 4 x 4, 3 epochs, warm-up over 100 steps,
AdamW in 8 bits, 500 texts. Dense weights take the adapters in at the end, packed ones keep them beside (`_lora.merge`).
Departures: the paper's loss neither shifts labels nor masks, and divides the divergence by the number of texts; see
`_losses`. With 500 texts there are 96 steps, fewer than the 100 of the paper's warm-up, which would never end: here it
is the first tenth of the steps.
Limits: training is in fp32, with two more copies of every trained weight for AdamW; `optimizer=adamw_8bit` and
`bf16=true` are for large models.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from compression import architectures, training
from compression.errors import RecipeError
from compression.layers.report import LEFT_ALONE, LayerReport
from compression.methods.base import TrainingMethod, check_samples, method
from compression.recipes.recipe import Recipe
from compression.recipes.registry import spell
from compression.training.settings import LINEARS, QV, Divergence, LoraSettings, Objective, OutputSettings, Settings

if TYPE_CHECKING:
    from torch import nn

    from compression.checkpoints.base import BaseSource
    from compression.methods.base import Context
    from compression.training.teacher import TeacherOutputs


@method("kd", takes=("dense",), leaves=None, needs=("calibration", "teacher", "training"))
@dataclass(frozen=True, kw_only=True)
class KD(TrainingMethod):
    """Train all weights on labels and on a teacher's softened outputs."""

    alpha: float = 0.3  # share of the teacher; 0 is the same training without one
    temperature: float = 4.0  # that softens the outputs of both
    divergence: Divergence = "forward_kl"  # of the softened outputs of teacher and student
    beta: float = 0.5  # of jensen_shannon
    top_k: int | None = None  # likeliest tokens of the teacher kept per position, the rest as one; none: all
    teacher_recipe: str = "fp16"  # what the teacher is compressed by, without data; the papers take llm_int8
    allow_vocab_mismatch: bool = False  # take ids to mean the same although the tokenizers say otherwise
    samples: int = 500  # texts; the paper takes about 20,800
    sequence_length: int = 512  # tokens of each
    epochs: int = 2  # passes over the texts
    learning_rate: float = 1e-4  # at the start of its decay
    batch: int = 2  # texts of a forward pass
    accumulation: int = 4  # forward passes of a step
    clip: float = 0.5  # largest norm of the gradients of a step
    warmup: float = 0.0  # share of the steps in which the learning rate rises
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"  # adamw_8bit: that of bitsandbytes
    bf16: bool = False  # whether to multiply in bf16
    save_steps: int = 100  # steps between two checkpoints
    patience: int = 0  # stop after this many epochs without a lower loss on a held-out tenth of the texts; 0: never

    def __post_init__(self) -> None:
        """Raises RecipeError: a value is not allowed, or a step takes more texts than there are."""
        check_samples(self)
        self.objective()  # which checks its values
        settings = self.settings(seed=0)
        texts = self.batch * self.accumulation
        if self.samples < texts:
            raise RecipeError(f"{self.info.name}(samples={self.samples}): one step takes batch x accumulation = "
                              f"{self.batch} x {self.accumulation} = {texts} texts; give more samples, or lower one "
                              "of them")  # fmt: skip
        settings.check_warmup(self.samples)
        if self.top_k is not None and self.top_k < 1:
            raise RecipeError(f"{self.info.name}(top_k={self.top_k}): allowed are 1 or more, or none for all tokens")
        if any(step.method.calibration or step.method.trains for step in Recipe.parse(self.teacher_recipe).steps):
            raise RecipeError(f"{self.info.name}(teacher_recipe={self.teacher_recipe}): the teacher is compressed "
                              "without data; allowed are fp16, llm_int8, nf4, rtn and the like")  # fmt: skip

    @property
    def calibration(self) -> tuple[int, int]:
        return self.samples, self.sequence_length

    @property
    def teacher(self) -> bool:
        return self.alpha > 0

    def objective(self) -> Objective:
        return Objective(alpha=self.alpha, temperature=self.temperature, divergence=self.divergence, beta=self.beta)

    def settings(self, *, seed: int) -> Settings:
        return Settings(
            epochs=self.epochs, learning_rate=self.learning_rate, batch=self.batch, accumulation=self.accumulation,
            clip=self.clip, warmup=self.warmup, optimizer=self.optimizer, bf16=self.bf16, save_steps=self.save_steps,
            patience=self.patience, seed=seed,
        )  # fmt: skip

    def student(self, model: "nn.Module", context: "Context") -> "nn.Module":
        """What is trained, of the weights that ask for gradients: all if none does."""
        return copy.deepcopy(model)

    def apply(self, model: "nn.Module", context: "Context") -> "nn.Module":
        """Raises LayerError: a weight is not finite; TeacherError, TrainingError: teacher or training cannot go on."""
        architectures.cuts.check_weights(model)
        assert context.ids is not None and context.folder is not None
        student, source = self.student(model, context), context.teacher
        outputs = None if not self.alpha or source is None else self._outputs(student, source, context)
        trained = training.trainer.train(
            student, context.ids.cpu(), self.objective(), self.settings(seed=context.seed),
            context.folder / "training", teacher=outputs, keep_zeros=context.pruned, progress=context.progress,
        )  # fmt: skip
        context.trained.append(trained)
        taught = "labels alone" if outputs is None else f"labels and {source.label} after {self.teacher_recipe}"  # type: ignore[union-attr]
        words = f"{spell(self)}: {len(trained.losses)} steps over {trained.tokens} tokens by {taught}"
        adapted, lost = training.adapters.adapted_layers(student), training.adapters.merge(student)
        self._report(student, context, words, adapted, lost)
        return student

    def _outputs(self, student: Any, source: "BaseSource", context: "Context") -> "TeacherOutputs":
        """What the teacher says of the texts."""
        assert context.ids is not None and context.folder is not None and context.open_teacher is not None
        teacher = training.teacher.Teacher(
            source=source, open=partial(context.open_teacher, self.teacher_recipe), recipe=self.teacher_recipe,
            device=context.device, seed=context.seed,
        )  # fmt: skip
        shared = min(student.config.vocab_size, source.config["vocab_size"])
        return training.teacher.teacher_outputs(
            context.folder / "teachers", teacher, context.ids.cpu(), progress=context.progress,
            settings=OutputSettings(k=self.top_k, vocabulary=shared),
        )  # fmt: skip

    def _report(
        self, student: "nn.Module", context: "Context", words: str, adapted: dict[str, Any], lost: dict[str, float]
    ) -> None:
        """What became of each layer: those with an adapter if there are some, else all, embeddings and norms too."""
        for block in architectures.decoder.decoder_blocks(student):
            for name, layer in block.linears():
                if adapted and name not in adapted:
                    context.report.append(LayerReport(name, "kept", LEFT_ALONE))
                    continue
                how = "" if not adapted else "; beside the weights" if layer is adapted[name] else (
                    f"; merged, of its norm {lost[name]:.3g} are lost to rounding")  # fmt: skip
                context.report.append(LayerReport(name, "replaced", words + how))
        if not adapted:
            around = architectures.table.architecture_of(student).around
            context.report += [LayerReport(name, "replaced", words) for name in around]


@method("distilled", takes=("dense", "packed", "sparse"), leaves=None, needs=("calibration", "teacher", "training"))
@dataclass(frozen=True, kw_only=True)
class Distilled(KD):
    """Train low-rank adapters on labels and on a teacher's softened outputs."""

    alpha: float = 0.5
    temperature: float = 2.0  # that softens the outputs of both
    epochs: int = 3  # passes over the texts
    learning_rate: float = 2e-4  # at the start of its decay
    batch: int = 4  # texts of a forward pass
    accumulation: int = 4  # forward passes of a step
    clip: float = 1.0  # largest norm of the gradients of a step
    warmup: float = 0.1  # the paper's 100 steps are more than there are
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw_8bit"  # adamw_8bit: that of bitsandbytes
    rank: int = 64  # of the adapters
    lora_alpha: float = 16.0  # the adapters' product is scaled by lora_alpha / rank
    dropout: float = 0.1  # share of the inputs of the adapters that is left out in training
    targets: Literal["qv", "all"] = "qv"  # linear layers with adapters: of queries and values, or all

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adapters(seed=0)  # which checks its values

    def adapters(self, *, seed: int) -> LoraSettings:
        return LoraSettings(
            rank=self.rank, alpha=self.lora_alpha, dropout=self.dropout, seed=seed,
            targets=LINEARS if self.targets == "all" else QV,
        )  # fmt: skip

    def student(self, model: "nn.Module", context: "Context") -> "nn.Module":
        training.adapters.attach(model, self.adapters(seed=context.seed), keep_zeros=context.pruned)
        return model
