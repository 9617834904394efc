"""What two runs must have in common: the one that left a folder and the one that goes on, and the processes of one."""

from collections.abc import Callable, Iterable

import torch
import transformers

from compression.engine.plan import Plan
from compression.errors import RecipeError
from compression.files.atomic import code_digest, digest_of
from compression.methods.base import Context
from compression.workers import Workers


def identity(plan: Plan, seed: int, device: str, contexts: Iterable[Context]) -> dict[str, str | int | list[str]]:
    """What the tensors of a result depend on, by name; not how many processes make them."""
    texts = [context.ids for context in contexts if context.ids is not None]
    return {
        "base digest": plan.source.digest,
        "recipe": plan.recipe.text,
        "seed": seed,
        "device": torch.device(device).type,
        "calibration text": [digest_of(ids) for ids in texts],
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
        "code of this package": code_digest(),
    }


def planned_together(workers: Workers, planned: Callable[[], Plan]) -> Plan:
    """A plan that the processes of a run can share, made by each of them.

    Raises:
        RecipeError: the recipe has a step on the whole model, whose work cannot be dealt out.
        WorkerError: another process could not make the plan; the message has its words.
    """
    plan = workers.each(planned)
    if workers.count > 1 and (reason := plan.whole_model):
        raise RecipeError(f"{plan.recipe.text} cannot be shared by {workers.count} processes: {reason}; start one "
                          "process, without torchrun")  # fmt: skip
    return plan
