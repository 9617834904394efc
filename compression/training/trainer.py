"""Training a student by an objective, on transformers' Trainer: `train`.

    <runs>/<key>/
        run.json             the seal: what the run is of, and the SHA-256 of the files of the checkpoints that count
        checkpoint-12/       trained weights, optimizer, schedule, random numbers, losses, as transformers has them

`<key>` is a hash of everything that the result depends on: the student's tensors, token ids, masks, the teacher's
outputs, objective, settings, versions. A call with the same arguments resumes from the last sealed checkpoint, and one
whose run has ended reads its result (`compression.sealed_folder`).

With `patience` the loss on texts held out is taken after each epoch; training ends once it has not fallen for so many,
and the weights are those of the lowest (the seal names their checkpoint, once the run has ended).

The student is trained in fp32, under autocast where `bf16` asks for it, and gets back the dtype that it came in.
Departure: batches with few tokens that count weigh less than full ones: the loss of a step is the mean over all tokens
of its batches (Trainer's own rule), not the mean of their means.
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from compression import devices
from compression.errors import TrainingError
from compression.files.atomic import digest_of, key_of
from compression.files.strict_json import expanded, finite, read_json
from compression.layers.packed import PackedLinear
from compression.layers.sparse import SparseLinear
from compression.numeric.losses import IGNORED, distillation, next_tokens
from compression.numeric.losses_in_chunks import Projected
from compression.sealed_folder import Seal, SealedFolder
from compression.training.settings import OPTIMIZERS, Objective, Settings
from compression.training.teacher import TeacherOutputs

_WEIGHTS = "model.safetensors"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
        folder: of the run.
        losses: of each step, nat per token as the objective weighs them.
        parameters: weights that were trained.
        tokens: that were read in all epochs.
    """

    folder: Path
    losses: tuple[float, ...]
    parameters: int
    tokens: int


def train(
    student: nn.Module,
    ids: Tensor,
    objective: Objective,
    settings: Settings,
    runs: str | Path,
    *,
    teacher: TeacherOutputs | None = None,
    mask: Tensor | None = None,
    learn: Tensor | None = None,
    keep_zeros: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train all weights of a student that ask for gradients, in place; ends in eval mode, without gradients.

    The student must not share tensors with a model that is to stay. No random state of the process is moved.

    Args:
        student: a decoder with `model` and `lm_head`, on its device; if none of its weights asks for gradients, all do.
        ids: int64 (samples, length).
        objective, settings: what is minimised, and how.
        runs: a folder for any number of runs.
        teacher: outputs for the same ids; may be None if alpha is 0.
        mask: (samples, length), 0 for padding.
        learn: (samples, length), 0 for tokens that are read and not learnt, such as questions; default all are learnt.
        keep_zeros: whether weights of the blocks that are exactly zero stay so, as after pruning.
        progress: called with (steps done, steps, what).

    Raises:
        RecipeError: the warm-up would not end.
        TrainingError: there are too few texts for one step, the teacher's outputs are of other texts, a loss or
            gradient is not finite (what was saved before stays), or what the run left is damaged or of another run,
            or another process is in the same run.
    """
    device = next(student.parameters()).device
    _check(ids, settings, objective, teacher, device)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        student.requires_grad_(True)
    identity = {**_identity(student, ids, mask, learn, objective, settings, teacher), "keep zeros": keep_zeros}
    folder = expanded(runs, TrainingError) / key_of(identity)
    busy = f"another process is training in {folder}; start again when it has ended"
    with (
        SealedFolder.claim(folder, _SEAL, identity, busy) as run,
        _random_state_kept(), devices.repeatable(device), _in_fp32(student),
    ):  # fmt: skip
        run.sweep(_CHECKPOINTS)
        guard = _Guard(run, progress, _zeros(student) if keep_zeros else [])
        trainer = _Trainer(student, _texts(ids, mask, learn), folder, objective, settings, teacher, guard)
        if "best" in run.facts:
            best, losses = _ended(run)
            trainer._load_from_checkpoint(str(best))
        else:
            last = max(_checkpoints(run), key=lambda path: int(path.name.rpartition("-")[2]), default=None)
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
            losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
            if settings.patience:
                run.commit(best=Path(trainer.best).name, losses=losses)
    student.zero_grad(set_to_none=True)
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    student.eval().requires_grad_(False)
    texts = settings.batch * settings.accumulation * len(losses)
    read = min(texts, settings.epochs * (len(ids) - settings.held_out(len(ids))))
    return Trained(folder, losses, trained, read * ids.shape[1])


@contextmanager
def _in_fp32(student: nn.Module) -> Iterator[None]:
    """All floating-point tensors in fp32, behind it each in its own dtype again; layers that store codes keep these.

    Trainer switches the cache of the model off for good; behind this it is as it was.
    """
    parameters = [(parameter, parameter.dtype) for parameter in student.parameters()]
    stored = [(layer, layer.dtype) for layer in student.modules() if isinstance(layer, PackedLinear | SparseLinear)]
    use_cache = student.config.use_cache
    student.float()
    try:
        yield
    finally:
        student.config.use_cache = use_cache
        for parameter, dtype in parameters:
            parameter.data = parameter.data.to(dtype)
        for layer, dtype in stored:
            layer.to(dtype)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Trainer seeds the generators of Python, NumPy and torch, on all GPUs; behind this they are as they were."""
    ours, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count() if torch.cuda.is_available() else 0)):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(of_numpy)


class _Texts(Dataset):
    def __init__(self, columns: dict[str, Tensor]):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["sample"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def some(self, first: int, end: int) -> "_Texts":
        return _Texts({name: column[first:end] for name, column in self.columns.items()})


def _texts(ids: Tensor, mask: Tensor | None, learn: Tensor | None) -> _Texts:
    labels = next_tokens(ids.long(), mask)
    if learn is not None:
        labels[:, :-1].masked_fill_(~learn[:, 1:].bool(), IGNORED)
    columns = {"sample": torch.arange(len(ids)), "input_ids": ids.long(), "shift_labels": labels}
    if mask is not None:
        columns["attention_mask"] = mask.long()
    return _Texts(columns)


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


class _Trainer(Trainer):
    """The loss of the objective; checkpoints that count only once they are whole; a stop at the first NaN."""

    def __init__(
        self, student: nn.Module, texts: _Texts, folder: Path, objective: Objective, settings: Settings,
        teacher: TeacherOutputs | None, guard: "_Guard",
    ) -> None:  # fmt: skip
        device, held = next(student.parameters()).device, settings.held_out(len(texts))
        evaluated: dict[str, Any] = {"save_strategy": "steps", "save_steps": settings.save_steps}
        if held:
            evaluated = {
                "save_strategy": "epoch", "eval_strategy": "epoch", "per_device_eval_batch_size": settings.batch,
                "load_best_model_at_end": True, "metric_for_best_model": "loss", "label_names": ["shift_labels"],
            }  # fmt: skip
        arguments = _Arguments.on(
            device, output_dir=str(folder), num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
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
        self.objective, self.teacher = objective, teacher
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole step

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        return sum(batch["shift_labels"].ne(IGNORED).sum() for batch in batch_samples).to(device)  # type: ignore[union-attr]

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:  # fmt: skip
        outputs = None if not self.objective.alpha else self.teacher.batch(inputs["sample"])  # type: ignore[union-attr]
        with self.accelerator.autocast():  # which accelerate puts around forward, and this is beside it
            found = model.model(
                input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), use_cache=False
            )
            head = model.lm_head
            weight = head.dequantize(torch.float32) if isinstance(head, PackedLinear) else head.weight
            student = Projected(found.last_hidden_state, weight, head.bias)
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
        if state.global_step >= state.max_steps:
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
        self.run.sweep(_CHECKPOINTS)


def _zeros(student: Any) -> list[tuple[Tensor, Tensor]]:
    """Weights of the blocks that are trained and have zeros, and where these are; adapters are called otherwise."""
    named = student.model.layers.named_parameters()
    weights = [w for name, w in named if name.endswith(".weight") and w.dim() == 2 and w.requires_grad]
    return [(weight, weight == 0) for weight in weights if (weight == 0).any()]


def _require_finite(value: Tensor, what: str, step: int) -> None:
    if not torch.isfinite(value):
        raise TrainingError(
            f"the {what} of step {step + 1} is {float(value)}; the last checkpoint before it stays; lower the learning "
            "rate, or look at the weights and texts that went in"
        )


def _check(
    ids: Tensor, settings: Settings, objective: Objective, teacher: TeacherOutputs | None, device: torch.device
) -> None:  # fmt: skip
    if settings.bf16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise TrainingError(f"bf16=true needs compute capability 8.0 or newer, and {device} has "
                            f"{torch.cuda.get_device_capability(device)}; train without it")  # fmt: skip
    if ids.dim() != 2 or ids.is_floating_point():
        raise TrainingError(f"token ids must be integers (samples, length), not {tuple(ids.shape)} of {ids.dtype}")
    if ids.shape[1] < 2:
        raise TrainingError(f"texts of {ids.shape[1]} tokens have no next token to learn; give longer ones")
    texts, held = settings.batch * settings.accumulation, settings.held_out(len(ids))
    if len(ids) - held < texts:
        held_out = f", {held} of them held out" if held else ""
        raise TrainingError(f"one step takes {settings.batch} x {settings.accumulation} = {texts} texts, and there are "
                            f"{len(ids)}{held_out}; give more text, or lower batch or accumulation")  # fmt: skip
    settings.check_warmup(len(ids))
    if objective.alpha and teacher is None:
        raise TrainingError(f"alpha={objective.alpha} needs a teacher's outputs; give them, or alpha=0")
    if teacher is not None and teacher.identity["token ids"] != digest_of(ids.long()):
        raise TrainingError(f"the teacher's outputs in {teacher.folder} are of other texts than the student is given")


def _identity(
    student: nn.Module, ids: Tensor, mask: Tensor | None, learn: Tensor | None, objective: Objective,
    settings: Settings, teacher: TeacherOutputs | None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the result depends on."""
    weights = hashlib.sha256(repr(student).encode())  # scales of adapters and number formats are no tensors
    for name, tensor in student.state_dict(keep_vars=True).items():
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode())
        weights.update(digest_of(tensor.detach().flatten().view(torch.uint8)).encode())
    return {
        "student": weights.hexdigest(),
        "token ids": digest_of(ids.long()),
        "mask": None if mask is None else digest_of(mask.bool()),
        "learn": None if learn is None else digest_of(learn.bool()),
        "teacher": teacher.identity if teacher is not None and objective.alpha else None,
        "objective": dataclasses.asdict(objective),
        "settings": dataclasses.asdict(settings),
        "device": next(student.parameters()).device.type,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }


def _checkpoints(run: SealedFolder) -> set[Path]:
    """The checkpoints of a run that count."""
    return {(run.path / name).parent for name in run.files}


def _ended(run: SealedFolder) -> tuple[Path, tuple[float, ...]]:
    """The best checkpoint of a run that has ended, and its losses.

    Raises:
        TrainingError: the seal says what cannot be.
    """
    try:
        best, losses = run.path / str(run.facts["best"]), tuple(map(finite, run.facts["losses"]))
        if best not in _checkpoints(run):
            raise ValueError(f"best={run.facts['best']!r} must be a checkpoint that counts")
    except (ValueError, TypeError, LookupError) as error:
        raise run.damaged(error) from error
    return best, losses


def _of_schema_1(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The seal of a run whose checkpoints have a file of digests each, and whose end is in a file of its own."""
    files = {}
    for finished in sorted(folder.glob(f"{_CHECKPOINTS}/finished.json")):
        digests = dict(read_json(finished))
        files |= {f"{finished.parent.name}/{name}": digest for name, digest in digests.items()}
    table = {"identity": identity, "files": files}
    if (folder / "best.json").exists():
        ended = read_json(folder / "best.json")
        table |= {"best": ended["checkpoint"], "losses": ended["losses"]}
    return table


_CHECKPOINTS = "checkpoint-*"
_SEAL = Seal("run.json", TrainingError, again="train again", earlier=_of_schema_1)
