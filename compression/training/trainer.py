"""Training a student by an objective, on transformers' Trainer: `train`.

    <runs>/<key>/
        run.json             the seal: what the run is of, and the SHA-256 of the files of the checkpoints that count
        checkpoint-12/       trained weights, optimizer, schedule, random numbers, losses, as transformers has them

`<key>` is a hash of everything that the result depends on: the student's tensors, token ids, masks, the teacher's
outputs, objective, settings, versions. A call with the same arguments resumes from the last sealed checkpoint, and one
whose run has ended reads its result (`compression.files.sealed_folder`).

With `patience` the loss on texts held out is taken after each epoch; training ends once it has not fallen for so many,
and the weights are those of the lowest (the seal names their checkpoint, once the run has ended).

The student is trained in fp32, under autocast where `bf16` asks for it, and gets back the dtype that it came in.
Departure: batches with few tokens that count weigh less than full ones: the loss of a step is the mean over all tokens
of its batches (Trainer's own rule), not the mean of their means.
"""

import dataclasses
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from compression import devices
from compression.errors import TrainingError
from compression.files.atomic import digest_of, key_of
from compression.files.sealed_folder import Seal, SealedFolder
from compression.files.strict_json import expanded, finite, read_json
from compression.layers.linear import Linear
from compression.layers.parts import WeightPart
from compression.training.downstream import Texts
from compression.training.objective_trainer import CHECKPOINTS, Lesson, ObjectiveTrainer, Progress
from compression.training.settings import Objective, Settings
from compression.training.teacher import TeacherOutputs


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
    texts: Texts | Tensor,
    objective: Objective,
    settings: Settings,
    runs: str | Path,
    *,
    teacher: TeacherOutputs | None = None,
    keep_zeros: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train all weights of a student that ask for gradients, in place; ends in eval mode, without gradients.

    The student must not share tensors with a model that is to stay. No random state of the process is moved.

    Args:
        student: a decoder of transformers, on its device; if none of its weights asks for gradients, all do.
        texts: what it reads; int64 (samples, length) of token ids stands for texts without padding, all learnt.
        objective, settings: what is minimised, and how.
        runs: a folder for any number of runs.
        teacher: outputs for the same ids; may be None if alpha is 0.
        keep_zeros: whether weights of the blocks that are exactly zero stay so, as after pruning.
        progress: called with (steps done, steps, what).

    Raises:
        RecipeError: the warm-up would not end.
        TrainingError: there are too few texts for one step, the teacher's outputs are of other texts, a loss or
            gradient is not finite (what was saved before stays), or what the run left is damaged or of another run,
            or another process is in the same run.
    """
    lesson = Lesson(Texts(texts) if isinstance(texts, Tensor) else texts, objective, settings, teacher, keep_zeros)
    device = next(student.parameters()).device
    _check(lesson, device)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        student.requires_grad_(True)
    identity = _identity(student, lesson)
    folder = expanded(runs, TrainingError) / key_of(identity)
    busy = f"another process is training in {folder}; start again when it has ended"
    with (
        SealedFolder.claim(folder, _SEAL, identity, busy) as run,
        _random_state_kept(), devices.repeatable(device), _in_fp32(student),
    ):  # fmt: skip
        losses = _trained(student, lesson, run, progress)
    student.zero_grad(set_to_none=True)
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    student.eval().requires_grad_(False)
    samples, length = lesson.texts.ids.shape
    read = settings.batch * settings.accumulation * len(losses)
    return Trained(
        folder, losses, trained, min(read, settings.epochs * (samples - settings.held_out(samples))) * length
    )


def _trained(student: nn.Module, lesson: Lesson, run: SealedFolder, progress: Progress | None) -> tuple[float, ...]:
    """Begin, resume or read a run; the losses of its steps."""
    run.sweep(CHECKPOINTS)
    trainer = ObjectiveTrainer(student, lesson, run, progress)
    if "best" in run.facts:
        best, losses = _ended(run)
        trainer._load_from_checkpoint(str(best))
        return losses
    last = max(_checkpoints(run), key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    if lesson.settings.patience:
        run.commit(best=Path(trainer.best).name, losses=losses)
    return losses


@contextmanager
def _in_fp32(student: nn.Module) -> Iterator[None]:
    """All floating-point tensors in fp32, behind it each in its own dtype again; layers that store codes keep these.

    Trainer switches the cache of the model off for good; behind this it is as it was.
    """
    parameters = [(parameter, parameter.dtype) for parameter in student.parameters()]
    stored = [
        (part, part.dtype) for part in student.modules() if isinstance(part, WeightPart) and part.summands == (part,)
    ]  # a sum has parts of several dtypes
    biases = [(layer, layer.bias.dtype) for layer in student.modules()
              if isinstance(layer, Linear) and layer.bias is not None]  # fmt: skip
    use_cache = student.config.use_cache
    student.float()
    try:
        yield
    finally:
        student.config.use_cache = use_cache
        for part, dtype in stored:
            if not part._parameters:
                part.to(dtype)
        for layer, dtype in biases:
            layer.bias.data = layer.bias.data.to(dtype)
        for parameter, dtype in parameters:
            parameter.data = parameter.data.to(dtype)


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


def _check(lesson: Lesson, device: torch.device) -> None:
    ids, settings, objective, teacher = lesson.texts.ids, lesson.settings, lesson.objective, lesson.teacher
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


def _identity(student: nn.Module, lesson: Lesson) -> dict[str, Any]:
    """Everything that the result depends on."""
    texts, objective, teacher = lesson.texts, lesson.objective, lesson.teacher
    weights = hashlib.sha256(repr(student).encode())  # scales of adapters and number formats are no tensors
    for name, tensor in student.state_dict(keep_vars=True).items():
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode())
        weights.update(digest_of(tensor.detach().flatten().view(torch.uint8)).encode())
    return {
        "student": weights.hexdigest(),
        "token ids": digest_of(texts.ids.long()),
        "mask": None if texts.mask is None else digest_of(texts.mask.bool()),
        "learn": None if texts.learn is None else digest_of(texts.learn.bool()),
        "teacher": teacher.identity if teacher is not None and objective.alpha else None,
        "objective": dataclasses.asdict(objective),
        "settings": dataclasses.asdict(lesson.settings),
        "device": next(student.parameters()).device.type,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
        "keep zeros": lesson.keep_zeros,
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
    for finished in sorted(folder.glob(f"{CHECKPOINTS}/finished.json")):
        digests = dict(read_json(finished))
        digests.pop(finished.name, None)  # of a checkpoint that was saved twice, that of the first time
        files |= {f"{finished.parent.name}/{name}": digest for name, digest in digests.items()}
    table = {"identity": identity, "files": files}
    if (folder / "best.json").exists():
        ended = read_json(folder / "best.json")
        table |= {"best": ended["checkpoint"], "losses": ended["losses"]}
    return table


_SEAL = Seal("run.json", TrainingError, again="train again", earlier=_of_schema_1)
