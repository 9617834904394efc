"""The tasks of the embedded reference as lm-eval tasks, with the shots, metrics and splits of the originals."""

import functools
from collections import defaultdict
from typing import Any

from bench import measure, reference
from bench.measure.scoring import programs


def configurations(name: str) -> list[dict[str, Any]]:
    """Of one task of the reference: one for each category where it has some, as MMLU has for each subject."""
    parts: dict[str | None, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    shots = reference.tasks.SHOTS.get(name, 0)
    for split in ("train", "test") if shots else ("test",):
        for item in reference.tasks.items(name, split):
            parts[item.get("category")][split].append(item)
    return [
        {
            "task": f"{name}_{category}" if category else name,
            "custom_dataset": _maker({split: rows[:shots] if split == "train" else rows for split, rows in of.items()}),
            "test_split": "test",
            "fewshot_split": "train" if shots else None,
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": shots,
            "doc_to_text": "{{question}}",
            "target_delimiter": "",
            "metadata": {"version": 1.0},
            **_written().get(name, _CHOICE),
        }
        for category, of in parts.items()
    ]


def _maker(splits: dict[str, list[dict[str, Any]]]) -> Any:
    def make(**metadata: Any) -> Any:
        from datasets import Dataset

        return {split: Dataset.from_list(rows) for split, rows in splits.items()}

    return make


def _greedy(task: str, stop: str) -> dict[str, Any]:
    return {"until": [stop], "max_gen_toks": measure.reference_scores.NEW_TOKENS[task], "do_sample": False}


_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "fewshot_delimiter": "\n",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}


@functools.cache
def _written() -> dict[str, dict[str, Any]]:
    """The tasks whose answers are written, not chosen."""
    return {
        "arithmetic": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "fewshot_delimiter": "",
            "generation_kwargs": _greedy("arithmetic", "\n"),
            "filter_list": [{"name": "strict-match", "filter": [
                {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"}, {"function": "take_first"}]}],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
                             "regexes_to_ignore": [r"(?s).*#### ", "\n"]}],
        },
        "code": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": _greedy("code", "\n\n"),
            "process_results": lambda doc, said: {"pass@1": programs.program(doc["question"] + said[0], doc["tests"])},
            "metric_list": programs.PASS,
        },
    }  # fmt: skip
