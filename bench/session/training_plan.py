"""The cost of training a recipe: tokens, memory, disk and operations, counted before anything starts."""

import dataclasses
from typing import TYPE_CHECKING, Any

import compression
from compression import architectures, checkpoints

if TYPE_CHECKING:
    from torch import nn

    from compression import BaseSource, Plan

_ADAM_BYTES = {"adamw": 8, "adamw_8bit": 2}  # of both moments of a weight
_ACTIVATIONS = 17  # numbers that a block keeps of a token for the way back, in widths of the model: the 34 bytes in 16
# bits of arXiv 2205.05198, equation 1, without the scores of attention, which a fused product does not keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The trainings of a recipe.

    Attributes:
        tokens: read in all epochs of all trainings.
        memory: bytes beside the base, of the largest training.
        disk: bytes of the teacher's outputs that are kept.
        flops: of all trainings and the teacher's reading.
    """

    tokens: int = 0
    memory: int = 0
    disk: int = 0
    flops: float = 0.0

    def then(self, other: "TrainingPlan") -> "TrainingPlan":
        """This training and another behind it."""
        return TrainingPlan(
            tokens=self.tokens + other.tokens, memory=max(self.memory, other.memory), disk=self.disk + other.disk,
            flops=self.flops + other.flops,
        )  # fmt: skip


def plan_training(plan: "Plan") -> TrainingPlan:
    """The trainings of all steps of a plan.

    Weights, gradients and moments are in fp32, activations as published for a transformer block without recomputing
    them. A step reads 2 operations a weight and token forward and 4 backward; frozen weights need 2 of the latter. What
    kept steps and kept outputs of a teacher would save is not known, so that this is the most that it takes.
    """
    found = TrainingPlan()
    for step in plan.recipe.steps:
        if step.method.trains:
            found = found.then(_of_step(step.method, plan))
    return found


def _of_step(method: Any, plan: "Plan") -> TrainingPlan:
    model, teacher = plan.base, plan.teacher
    settings = method.settings(seed=0)
    if method.downstream:
        assert plan.downstream is not None
        ids = plan.downstream.texts(
            plan.source.tokenizer, samples=method.samples, length=method.sequence_length, seed=0
        ).ids
        texts, length = ids.shape
    else:
        texts, length = method.calibration
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = _adapted(method.adapters(seed=0), model) if hasattr(method, "adapters") else weights
    frozen = 0 if trained == weights else weights
    config: Any = model.config
    kept = settings.batch * length * config.num_hidden_layers * config.hidden_size * _ACTIVATIONS
    tokens, disk = settings.epochs * texts * length, 0
    flops = float(tokens) * (6 * trained + 4 * frozen)
    if method.teacher and teacher is not None:
        vocabulary = min(config.vocab_size, teacher.config["vocab_size"])
        logits = vocabulary * checkpoints.weights.open_weights(teacher).dtype.itemsize
        of_position = logits if method.top_k is None else 8 * method.top_k + 4
        disk = texts * length * of_position
        flops += 2.0 * texts * length * _weights_of(teacher)
    memory = 4 * (frozen + trained) + 4 * trained + _ADAM_BYTES[settings.optimizer] * trained + 4 * kept
    return TrainingPlan(tokens=tokens, memory=memory, disk=disk, flops=flops)


def _adapted(adapters: Any, model: "nn.Module") -> int:
    """Weights of the adapters of a model's linear layers."""
    return sum(
        adapters.rank * (linear.in_features + linear.out_features)
        for block in architectures.decoder.decoder_blocks(model)
        for name, linear in block.linears()
        if name.rpartition(".")[2] in adapters.targets
    )


def _weights_of(source: "BaseSource") -> int:
    return sum(parameter.numel() for parameter in compression.Planner(source).base.parameters())
