"""Distillation for several epochs: the teacher asked once and kept on disk, against the teacher in every step.

    python benchmarks/distillation_speed.py [--base reference] [--teacher reference-teacher] [--samples 64]

Both sides train the same student on the same texts in the same order by the same objective, through transformers'
Trainer, in fp32: one reads the teacher's outputs (all tokens, fp32) from a cache that it fills first, and takes the
divergence in chunks; the other runs the teacher in every step and takes the divergence of whole logits, as listing 7 of
[E] and most code do. Printed are the largest difference of their losses, their times, and the share that is reached of
what a cache can give: with s and t the times of a step without a teacher and of the teacher's forward pass alone, as
measured here, and E epochs, E (s + t) / (E s + t).
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments, default_data_collator

import compression
from compression.calibration.text import open_calibration
from compression.training.settings import Objective, OutputSettings, Settings
from compression.training.teacher import Teacher, teacher_outputs
from compression.training.trainer import train

OBJECTIVE = Objective(alpha=0.3, temperature=4.0)  # of [O]
ALLOWED = 1e-4  # difference of losses
BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="reference")
    parser.add_argument("--teacher", default="reference-teacher")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    base, teacher = (compression.open_base(text) for text in (options.base, options.teacher))
    base.model.float(), teacher.model.float()
    text = open_calibration(None, base.source)
    assert text is not None
    ids = text.tokens(
        base.tokenizer, samples=options.samples, length=options.length, seed=0, vocabulary=base.model.config.vocab_size,
        ended=True,
    )  # fmt: skip
    settings = Settings(epochs=options.epochs, learning_rate=1e-4, batch=BATCH, accumulation=1, clip=0.5)
    with tempfile.TemporaryDirectory() as folder:
        _kept(base.model, options.teacher, ids[: 2 * BATCH], settings, Path(folder) / "warm up")
        losses, seconds = _kept(base.model, options.teacher, ids, settings, Path(folder) / "kept")
        theirs, plainly = _plain(base.model, teacher.model, ids, settings, folder)
        _, alone = _plain(base.model, None, ids, settings, folder)
    asked = _forward(teacher.model, ids)
    bound = options.epochs * (alone / options.epochs + asked) / (alone + asked)
    difference = max(abs(ours - other) for ours, other in zip(losses, theirs, strict=True))
    print(f"{len(losses)} steps of {BATCH} x {options.length} tokens, {options.epochs} epochs, threads "
          f"{torch.get_num_threads()}; losses differ by at most {difference:.1e} of {losses[0]:.3f}")  # fmt: skip
    print(f"teacher kept {seconds:.1f} s, teacher in every step {plainly:.1f} s: {plainly / seconds:.2f}x, of at most "
          f"{bound:.2f}x: {plainly / seconds / bound:.0%}")  # fmt: skip
    print(f"student without a teacher {alone:.1f} s, teacher's forward pass {asked:.1f} s an epoch")
    assert difference <= ALLOWED, f"losses differ by {difference}, allowed are {ALLOWED}"


def _kept(model: Any, teacher: str, ids: torch.Tensor, settings: Settings, folder: Path) -> tuple[list[float], float]:
    """Losses, and seconds for all of it: teacher opened, asked, and the student trained."""
    student, begin = copy.deepcopy(model), time.perf_counter()
    source = compression.locate(teacher).fetch()
    asked = Teacher(source=source, open=lambda: compression.open_base(source).model)
    kept = OutputSettings(arithmetic="float32", batch=BATCH)
    outputs = teacher_outputs(folder / "teachers", asked, ids, settings=kept)
    trained = train(student, ids, OBJECTIVE, settings, folder / "training", teacher=outputs)
    return list(trained.losses), time.perf_counter() - begin


class _Plain(Trainer):
    """The textbook's loop."""

    teacher: Any = None

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        ids = inputs["input_ids"]
        z = model(input_ids=ids, use_cache=False).logits[:, :-1]
        task = functional.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten())
        if self.teacher is None:
            return task
        with torch.no_grad():
            t = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        temperature = OBJECTIVE.temperature
        log_q, p = functional.log_softmax(z / temperature, -1), functional.softmax(t / temperature, -1)
        divergence = functional.kl_div(log_q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean")
        return (1 - OBJECTIVE.alpha) * task + OBJECTIVE.alpha * temperature**2 * divergence


def _plain(model: Any, teacher: Any, ids: torch.Tensor, settings: Settings, folder: str) -> tuple[list[float], float]:
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch, max_grad_norm=settings.clip, logging_steps=1, report_to=[],
        disable_tqdm=True, save_strategy="no", use_cpu=True, seed=settings.seed, remove_unused_columns=False,
    )  # fmt: skip
    student = copy.deepcopy(model).requires_grad_(True)
    trainer = _Plain(student, arguments, default_data_collator, [{"input_ids": row} for row in ids])
    trainer.pop_callback(type(trainer.callback_handler.callbacks[-1]))  # prints every loss
    trainer.teacher = teacher
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], seconds


def _forward(teacher: Any, ids: torch.Tensor) -> float:
    """Seconds of the teacher's forward pass over all texts."""
    begin = time.perf_counter()
    with torch.no_grad():
        for some in ids.split(BATCH):
            teacher(input_ids=some, use_cache=False)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
