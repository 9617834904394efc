"""What a task asks a model, as lm-eval builds it."""

from bench.data.tasks.table import SEED


def built(prepared, limit):
    for part in prepared.parts.values():
        part.set_fewshot_seed(seed=SEED)
        part.build_all_requests(limit=limit, rank=0, world_size=1)
    return [instance for part in prepared.parts.values() for instance in part.instances]
