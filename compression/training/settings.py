"""What training minimises, and how: values that recipes are checked against before torch is imported."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from compression.architectures.table import ARCHITECTURES
from compression.errors import RecipeError, TeacherError
from compression.numeric.bounds import check_beta, check_temperature

OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}  # by transformers' name
_HALVES = [half for row in ARCHITECTURES.values() for half in (*row.attentions, *row.mlps)]
LINEARS = tuple(dict.fromkeys(
    path.rpartition(".")[2] for half in _HALVES
    for path in (*half.readers, *(reader for site in half.latents for reader in site.readers), half.writer)
))  # fmt: skip
QV = tuple(dict.fromkeys(path.rpartition(".")[2] for half in _HALVES if half.name == "attention" and half.queries
                         for path in (half.queries, half.producer)))  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")  # in which outputs of a teacher can be kept
UNCOMPRESSED = "fp16"  # the recipe of a teacher that is asked as it is

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """(1 - alpha) task + alpha T^2 divergence: [O] equation 1 and [E] section 3.3.3; T^2 is [O]'s and [E] listing 7's.

    alpha 0 is training without a teacher, 1 distillation without labels. Gradients of softened distributions shrink
    with 1 / T^2, hence the factor (arXiv 1503.02531, section 2).

    Raises:
        RecipeError: a value is not one that is allowed.
    """

    alpha: float  # 0 to 1, share of the divergence
    temperature: float  # above 0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5  # of jensen_shannon, between 0 and 1: the share of the teacher in the mixture

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha={self.alpha}: allowed are 0 (labels alone) to 1 (teacher alone)")
        check_temperature(self.temperature)
        if self.divergence not in get_args(Divergence):
            raise RecipeError(f"divergence={self.divergence!r}: allowed are {', '.join(get_args(Divergence))}")
        check_beta(self.beta)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Raises:
        RecipeError: a value is not one that is allowed.
    """

    epochs: int
    learning_rate: float  # the highest; falls linearly to 0 after the warm-up
    batch: int  # texts of a forward pass
    accumulation: int  # forward passes of a step
    clip: float  # largest norm of a step's gradient
    warmup: float = 0.0  # share of the steps in which the learning rate rises from 0
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    bf16: bool = False  # whether to multiply in bf16
    save_steps: int = 100  # between checkpoints; the last step has one in any case
    seed: int = 0  # of the order of the texts
    patience: int = 0  # stop after this many epochs without a lower loss on texts held out; 0: none are held out

    def held_out(self, texts: int) -> int:
        """How many of so many texts, the last ones, are not trained on: a tenth, at least a batch, with `patience`."""
        return max(self.batch, texts // 10) if self.patience else 0

    def check_warmup(self, texts: int) -> None:
        """Raise RecipeError if the warm-up over so many texts takes all steps: the rate would never be reached."""
        batches = -(-(texts - self.held_out(texts)) // self.batch)
        steps = self.epochs * -(-batches // self.accumulation)
        if self.warmup and steps and math.ceil(self.warmup * steps) >= steps:
            raise RecipeError(f"warmup={self.warmup}: of {steps} steps over {texts} texts it takes "
                              f"{math.ceil(self.warmup * steps)}, so that it does not end before the training does; "
                              "give a smaller share, 0 for none, or more texts or epochs")  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulation", "save_steps"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.patience < 0:
            raise RecipeError(f"patience={self.patience}: must be 0 or more")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"warmup={self.warmup}: allowed are 0 (none) to below 1, a share of the steps")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"{name}={getattr(self, name)}: must be above 0")
        if self.optimizer not in OPTIMIZERS:
            raise RecipeError(f"optimizer={self.optimizer!r}: allowed are {', '.join(OPTIMIZERS)}")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The defaults are those of [E], section 3.3.3.

    Raises:
        RecipeError: a value is not one that is allowed.
    """

    rank: int = 64
    alpha: float = 16.0  # the product is scaled by alpha / rank
    dropout: float = 0.1  # of the adapters' inputs, in training
    targets: tuple[str, ...] = QV  # linear layers of each block, among LINEARS
    seed: int = 0  # of the matrices A; each layer draws by its own name

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"rank={self.rank}: must be at least 1")
        if not 0 < self.alpha < float("inf"):
            raise RecipeError(f"alpha={self.alpha}: must be above 0")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout={self.dropout}: allowed are 0 to below 1")
        if not self.targets or not set(self.targets) <= set(LINEARS):
            raise RecipeError(f"targets={self.targets}: allowed are some of {', '.join(LINEARS)}")


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is kept of a teacher's outputs, and how they are computed."""

    k: int | None = None  # how many tokens of each position; all logits, which is exact, if None
    vocabulary: int | None = None  # only the first so many tokens are taken; all if None
    arithmetic: Literal["stored", "float32"] = "stored"  # that of the teacher's weights, or fp32
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of what is kept; None loses nothing: for logits
    # that of the arithmetic, for log-probabilities, computed in fp32, float32
    batch: int = 4  # texts at a time
    shard_bytes: int = 2**26  # about the size of a file, and what is done again after a kill

    def of_teacher(self, rows: int, recipe: str) -> "OutputSettings":
        """With numbers for None, for a teacher of so many tokens that is compressed by a recipe.

        Raises:
            RecipeError: arithmetic or dtype is not one that is allowed.
            TeacherError: the teacher has not as many tokens.
        """
        vocabulary = rows if self.vocabulary is None else self.vocabulary
        if not 1 <= vocabulary <= rows:
            raise TeacherError(f"vocabulary={vocabulary}: allowed are 1 to {rows}, the teacher's")
        if self.k is not None and not 1 <= self.k <= vocabulary:
            raise TeacherError(f"k={self.k}: allowed are 1 to the vocabulary of {vocabulary}, or None for all")
        if self.batch < 1:
            raise TeacherError(f"batch={self.batch}: must be at least 1")
        if self.arithmetic not in ("stored", "float32") or (self.arithmetic == "float32" and recipe != UNCOMPRESSED):
            raise RecipeError(f"arithmetic={self.arithmetic!r} of a teacher by {recipe}: allowed are stored, and for "
                              "an uncompressed one float32")  # fmt: skip
        if self.dtype not in (None, *DTYPES):
            raise RecipeError(f"dtype={self.dtype!r}: allowed are {', '.join(DTYPES)}, or None to lose nothing")
        return replace(self, k=None if self.k == vocabulary else self.k, vocabulary=vocabulary)
