"""Task configurations from lm-eval's package, with the shots and votes of our table; two are changed.

MATH (arXiv 2103.03874) is asked as by Minerva (arXiv 2206.14858, appendix D): its four worked examples, its
normalisation of answers, equality by SymPy, and temperature and top-p of its samples, of which [E] says nothing.
Departures from lm-eval, which scores one greedy answer: the most frequent of the normalised answers of all samples is
scored, of equally frequent ones the first; a sample without an answer has no vote.

AGIEval (arXiv 2304.06364): lm-eval asks without examples, and has none. Here the first questions of each file stand
before every other question of it, with the option that is right; the paper's own examples are in neither data set.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from bench.data.tasks.table import Task
from bench.errors import NotAvailable
from compression.errors import install_command

Configuration = dict[str, Any]


def configurations(task: Task) -> list[Configuration]:
    """Of all members of a task. Raises NotAvailable where one needs a library that is not installed."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.__file__).parent / "tasks"
    paths = sorted({path for member in task.members for path in root.glob(member) if not path.name.startswith("_")})
    try:
        found = [load_yaml(path) for path in paths]
    except (ImportError, AssertionError) as error:  # what MATH's says of a wrong version
        raise NotAvailable(
            f"{task.title}: its configuration needs more libraries: {install_command('math')} ({str(error)[:200]})"
        ) from error
    return [configuration | _CHANGES.get(task.name, {}) for configuration in found]


def with_settings(configuration: Configuration, task: Task) -> Configuration:
    """With the shots and votes of our table; without what only an index of tasks reads."""
    changed = {key: value for key, value in configuration.items() if key not in ("tag", "group", "task_list")}
    changed["num_fewshot"] = task.shots
    if task.votes > 1:
        changed["repeats"] = task.votes
        sampling = {"do_sample": True, "temperature": task.temperature, "top_p": task.top_p}
        changed["generation_kwargs"] = changed["generation_kwargs"] | sampling
    if changed.get("filter_list") is not None:
        changed["filter_list"] = [each for each in changed["filter_list"] if each["name"] == task.filter]
    return changed


def majority(doc: dict[str, Any], said: list[list[str]]) -> dict[str, int]:
    """1 where the answer that most samples of a question of MATH end in is equal to the right one."""
    from lm_eval.tasks.minerva_math import utils as minerva

    none = minerva.get_unnormalized_answer("")
    found = [answer for text in said[0] if (answer := minerva.get_unnormalized_answer(text)) != none]
    votes = Counter(map(minerva.normalize_final_answer, found)).most_common(1)
    return {"exact_match": int(bool(votes) and minerva.is_equiv(votes[0][0], doc["answer"]))}


_CHANGES: dict[str, Configuration] = {
    "math": {
        "process_results": majority,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "maj@4", "filter": [{"function": "take_first_k", "k": 4}]}],
    },
    "agieval": {
        "fewshot_split": "test",  # lm-eval never shows a question its own answer
        "fewshot_config": {"sampler": "first_n", "doc_to_target": "{{choices[gold[0]]}}"},
    },
}
