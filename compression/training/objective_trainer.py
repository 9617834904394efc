"""transformers' Trainer under the objective of distillation: its loss, its checkpoints, what it must leave alone."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from compression.architectures.decoder import decoder_blocks
from compression.architectures.table import architecture_of
from compression.errors import TrainingError
from compression.files.sealed_folder import SealedFolder
from compression.layers.linear import Linear
from compression.numeric.losses import IGNORED, next_tokens
from compression.numeric.losses_in_chunks import Projected
from compression.training.downstream import Texts
from compression.training.objective import distillation
from compression.training.settings import OPTIMIZERS, Objective, Settings
from compression.training.teacher import TeacherOutputs

CHECKPOINTS = "checkpoint-*"

_WEIGHTS = "model.safetensors"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Lesson:
    """What a student is trained on, by what, and how.

    Attributes:
        texts: what it reads.
        objective: what is minimised.
        settings: how.
        teacher: outputs for the same token ids; may be None if the objective has no share of it.
        keep_zeros: whether weights of the blocks that are exactly zero stay so, as after pruning.
    """

    texts: Texts
    objective: Objective
    settings: Settings
    teacher: TeacherOutputs | None = None
    keep_zeros: bool = False


class _Columns(Dataset):
    def __init__(self, columns: dict[str, Tensor]):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["sample"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def some(self, first: int, end: int) -> "_Columns":
        return _Columns({name: column[first:end] for name, column in self.columns.items()})


def _columns(texts: Texts) -> _Columns:
    ids, mask = texts.ids, texts.mask
    labels = next_tokens(ids.long(), mask)
    if texts.learn is not None:
        labels[:, :-1].masked_fill_(~texts.learn[:, 1:].bool(), IGNORED)
    columns = {"sample": torch.arange(len(ids)), "input_ids": ids.long(), "shift_labels": labels}
    if mask is not None:
        columns["attention_mask"] = mask.long()
    return _Columns(columns)


class _Arguments(TrainingArguments):
    """Trainer's own would take the first GPU, make it the current one, and split batches over all that there are."""

    where = torch.device("cpu")

    @classmethod
    def on(cls, device: torch.device, **options: Any) -> "_Arguments":
        return type(cls.__name__, (cls,), {"where": device})(use_cpu=device.type == "cpu", **options)  # type: ignore[return-value]

    @functools.cached_property
    def _setup_devices(self) -> torch.device:
        AcceleratorState._reset_state(reset_partial_state=True)
        self.distributed_state = PartialState(cpu=True)  # one process; which device it has is said below
        self.distributed_state.device = self.where
        return self.where

    @property
    def n_gpu(self) -> int:
        """How many Trainer splits a batch over, however many there are."""
        return int(self.where.type == "cuda")


class ObjectiveTrainer(Trainer):
    """The loss of the objective; checkpoints that count only once they are whole; a stop at the first NaN."""

    def __init__(self, student: nn.Module, lesson: Lesson, run: SealedFolder, progress: Progress | None) -> None:
        texts, settings = _columns(lesson.texts), lesson.settings
        device, held = next(student.parameters()).device, settings.held_out(len(texts))
        guard = _Guard(run, progress, _zeros(student) if lesson.keep_zeros else [])
        evaluated: dict[str, Any] = {"save_strategy": "steps", "save_steps": settings.save_steps}
        if held:
            evaluated = {
                "save_strategy": "epoch", "eval_strategy": "epoch", "per_device_eval_batch_size": settings.batch,
                "load_best_model_at_end": True, "metric_for_best_model": "loss", "label_names": ["shift_labels"],
            }  # fmt: skip
        arguments = _Arguments.on(
            device, output_dir=str(run.path), num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch, gradient_accumulation_steps=settings.accumulation,
            max_grad_norm=settings.clip, warmup_steps=settings.warmup, optim=OPTIMIZERS[settings.optimizer],
            bf16=settings.bf16, seed=settings.seed, **evaluated,
            logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False, report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False, lr_scheduler_type="linear",
        )  # fmt: skip
        stop = [EarlyStoppingCallback(settings.patience)] if held else []
        super().__init__(
            student, arguments, default_data_collator, texts.some(0, len(texts) - held),
            texts.some(len(texts) - held, len(texts)) if held else None, callbacks=[guard, *stop],
        )  # fmt: skip
        self.pop_callback(transformers.PrinterCallback)
        self.objective, self.teacher = lesson.objective, lesson.teacher
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole step

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        return sum(batch["shift_labels"].ne(IGNORED).sum() for batch in batch_samples).to(device)  # type: ignore[union-attr]

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:  # fmt: skip
        outputs = None if not self.objective.alpha else self.teacher.batch(inputs["sample"])  # type: ignore[union-attr]
        with self.accelerator.autocast():  # which accelerate puts around forward, and this is beside it
            found = model.get_decoder()(
                input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), use_cache=False
            )
            head, divisor = model.get_output_embeddings(), architecture_of(model).logits_divisor
            weight = head.dequantize(torch.float32) if isinstance(head, Linear) else head.weight
            hidden = found.last_hidden_state
            hidden = hidden if divisor is None else hidden / getattr(model.config, divisor)
            student = Projected(hidden, weight, head.bias)
            loss = distillation(
                student, outputs, inputs["shift_labels"], self.objective, items=num_items_in_batch
            ).total
        _require_finite(loss.detach(), "loss", self.state.global_step)
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    @property
    def best(self) -> str:
        """The checkpoint of the lowest loss on texts held out."""
        return self.state.best_model_checkpoint

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.best)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
        safetensors.torch.save_file(trained, str(folder / _WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        parameters = dict((model or self.model).named_parameters())
        for name, value in safetensors.torch.load_file(str(Path(resume_from_checkpoint) / _WEIGHTS)).items():
            parameters[name].data.copy_(value)


class _Guard(TrainerCallback):
    """Looks at gradients before they are applied, keeps zeros, seals checkpoints, and tells how far the run is."""

    def __init__(self, run: SealedFolder, progress: Progress | None, zeros: list[tuple[Tensor, Tensor]]):
        self.run, self.progress, self.zeros = run, progress, zeros

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        _require_finite(nn.utils.get_total_norm(gradients), "gradient", state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for weight, zero in self.zeros:
                weight.masked_fill_(zero, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.save_strategy != "epoch":  # whose end saves it anyway
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if self.progress is not None and "loss" in logs:
            self.progress(state.global_step, state.max_steps, f"loss {logs['loss']:.4f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = self.run.path / f"checkpoint-{state.global_step}"
        best = Path(state.best_model_checkpoint or done)
        self.run.adopt(done.iterdir())
        self.run.drop(name for name in self.run.files if Path(name).parent.name not in (done.name, best.name))
        self.run.commit()
        self.run.sweep(CHECKPOINTS)


def _zeros(student: Any) -> list[tuple[Tensor, Tensor]]:
    """Weights of the blocks that are trained and have zeros, and where these are; adapters are called otherwise."""
    named = [each for block in decoder_blocks(student) for each in block.module.named_parameters()]
    weights = [w for name, w in named if name.endswith(".weight") and w.dim() == 2 and w.requires_grad]
    return [(weight, weight == 0) for weight in weights if (weight == 0).any()]


def _require_finite(value: Tensor, what: str, step: int) -> None:
    if not torch.isfinite(value):
        raise TrainingError(
            f"the {what} of step {step + 1} is {float(value)}; the last checkpoint before it stays; lower the learning "
            "rate, or look at the weights and texts that went in"
        )
