"""Tasks whose answers are programs, run against the tests of the item in a sandbox (`bench.measure.sandbox.run`).

What lm-eval takes for the score of an item is the program; when all are written, `bench.metrics.tasks` runs them.

HumanEval: arXiv 2107.03374; the completion of a signature with its docstring. MBPP: arXiv 2108.07732, whose prompt this
is, with its tasks 2, 3 and 4 as the three worked examples, and tasks 11 to 510 as the test split. What its tests need
besides (`test_setup_code`: objects of a class that the program declares) runs between program and tests.
"""

from collections.abc import Sequence
from typing import Any

from bench.measure.sandbox import run

PASS = [{"metric": "pass@1", "aggregation": len, "higher_is_better": True}]
_MBPP = (
    "You are an expert Python programmer, and here is your task: {{text}} Your code should pass these tests:\n\n"
    "{{test_list | join('\n')}}\n[BEGIN]\n"
)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "humaneval": {
        "task": "humaneval",
        "dataset_path": "openai/openai_humaneval",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": 512, "do_sample": False,
        },
        "process_results": lambda doc, said: {"pass@1": program(
            doc["prompt"] + said[0], [doc["test"], f"check({doc['entry_point']})"])},
        "metric_list": PASS,
    },
    "mbpp": {
        "task": "mbpp",
        "dataset_path": "google-research-datasets/mbpp",
        "dataset_name": "full",
        "test_split": "test",
        "fewshot_split": "prompt",
        "fewshot_config": {"sampler": "first_n", "process_docs": lambda rows: rows.filter(
            lambda row: row["task_id"] in (2, 3, 4))},
        "output_type": "generate_until",
        "doc_to_text": _MBPP,
        "doc_to_target": "{{code}}\n[DONE]",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["[DONE]"], "max_gen_toks": 256, "do_sample": False},
        "process_results": lambda doc, said: {"pass@1": program(
            said[0], [doc["test_setup_code"], *doc["test_list"]])},
        "metric_list": PASS,
    },
}  # fmt: skip


def program(text: str, tests: Sequence[str]) -> str:
    """What the model wrote, followed by the tests."""
    return "\n".join([text, *tests])


def passes(programs: Sequence[str]) -> list[float]:
    """1 for each that runs through its tests in the sandbox, else 0."""
    return [float(outcome.passed) for outcome in run.run_all(programs)]
