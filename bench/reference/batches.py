"""Lessons packed into the rows of a training step."""

from typing import TYPE_CHECKING

from bench.reference import lessons, world

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


def batch(
    vocabulary: "PreTrainedTokenizerFast", *, seed: int, step: int, share: float, rows: int, length: int
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Lessons packed in rows: ids, the ids that follow, and the weights of those in the loss, (rows, length) each.

    A lesson ends with `</s>` and is never cut; of eight that wait, a row takes the first that still fits.
    """
    import torch

    draw = world.Draw("batch", seed, step)
    waiting: list[tuple[list[int], list[float]]] = []
    packed = []
    for _ in range(rows):
        ids: list[int] = []
        weights: list[float] = []
        while True:
            while len(waiting) < 8:
                waiting.append(_encode(vocabulary, lessons.lesson(draw, share)))
            fitting = [n for n, (more, _) in enumerate(waiting) if len(ids) + len(more) <= length + 1]
            if fitting:
                more, learn = waiting.pop(fitting[0])
                ids, weights = ids + more, weights + learn
            elif ids:
                break
            else:
                waiting.clear()  # lessons longer than a row
        room = length + 1 - len(ids)
        packed.append((ids + [vocabulary.pad_token_id] * room, weights + [0.0] * room))
    ids_, weights_ = torch.tensor([ids for ids, _ in packed]), torch.tensor([weights for _, weights in packed])
    return ids_[:, :-1], ids_[:, 1:], weights_[:, 1:]


def _encode(vocabulary: "PreTrainedTokenizerFast", lesson: lessons.Lesson) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in lesson:
        more = vocabulary.encode(text, add_special_tokens=False)
        ids, weights = ids + more, weights + [float(weight)] * len(more)
    return [*ids, vocabulary.eos_token_id], [*weights, 0.0]
