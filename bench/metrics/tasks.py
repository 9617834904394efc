"""Accuracy on the tasks of `bench.data.tasks.table`, scored through lm-eval by our own adapter.

    accuracy = right answers / questions

What is right is for the task's metric to say: the likeliest choice (acc), the likeliest by its length in characters
(acc_norm), the answer that matches (exact_match), the program that passes its tests (pass@1); an answer to QuAC is as
right as the words it shares with those of people (f1). A task of several parts, as the subjects of MMLU, counts every
question once. Scores are the same from run to run on one device; on another, a near tie can fall the other way, which
is why they are gated as `sampled`, and compared question by question besides.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.data.tasks.table import SEED, Task
from bench.errors import NotAvailable
from bench.measure import scoring
from bench.measure.scoring.programs import passes
from bench.metrics.registry import metric
from bench.results.items import hashes_of
from bench.results.row import NATIVE

if TYPE_CHECKING:
    from bench.measure.scoring.prepare import Prepared
    from bench.results.row import Row

REL = 0.02  # share of the accuracy, relative to the base's, that may be lost before the gate fails


@dataclass(frozen=True, kw_only=True)
class TaskReading:
    """One task scored: 1 or 0 for each question (QuAC: F1), and the hash of what it asks."""

    task: Task
    data: str
    values: tuple[float, ...]
    hashes: tuple[str, ...]
    truncated: int = 0  # prompts that lost their beginning to the context
    shared: bool = True  # whether what prompts begin with was read once
    thinking: str | None = None  # what was cut of answers, in words

    @property
    def accuracy(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def params(self) -> dict[str, Any]:
        """Part of the key of the row."""
        return {"items": len(self.values), "data": self.data}

    @property
    def remark(self) -> str | None:
        """What a reader of the score must know, or None."""
        said = [self.thinking] if self.thinking else []
        if self.truncated:
            said.append(
                f"{self.truncated} prompts of {self.task.title} exceed the context: their beginning was left out"
            )
        if not self.shared:
            said.append("attention takes no shared beginnings: read one by one")
        return "; ".join(said) or None

    @property
    def items(self) -> Mapping[str, tuple[tuple[str, ...], tuple[float, ...], str]]:
        """Results by question, by name of the metric."""
        return {"quality.accuracy": (self.hashes, self.values, self.task.kind)}


@dataclass(frozen=True, kw_only=True)
class SuiteReading:
    """Accuracies of the tasks that could be scored, by name, of a model and of its base, and their dtype."""

    accuracies: Mapping[str, float]
    base: Mapping[str, float] = field(default_factory=dict)
    compute_dtype: str | None = None

    @property
    def average(self) -> float:
        return math.fsum(self.accuracies.values()) / len(self.accuracies)

    @property
    def drop(self) -> float:
        return math.fsum(self.base[name] - value for name, value in self.accuracies.items()) / len(self.accuracies)


@metric("quality.accuracy", unit="share", better="higher", kind="sampled", of="task", rel=REL)
def accuracy(reading: TaskReading) -> float:
    """Share of the questions answered rightly, by the task's metric (SPEC section 4; E-JUST, tables 5, 7 and 20).

    >>> from bench.data.tasks.table import SUITE
    >>> accuracy(TaskReading(task=SUITE["piqa"], data="doctest", values=(1.0, 0.0, 1.0, 1.0), hashes=tuple("abcd")))
    0.75
    """
    return reading.accuracy


@metric("quality.average_accuracy", unit="share", better="higher", kind="sampled", of="tasks", rel=REL)
def average_accuracy(reading: SuiteReading) -> float:
    """Mean of the accuracies of the tasks evaluated, each counting the same (E-JUST, table 21).

    >>> average_accuracy(SuiteReading(accuracies={"piqa": 0.75, "mmlu": 0.25}))
    0.5
    """
    return reading.average


@metric("quality.accuracy_drop", unit="share", better="lower", kind="sampled", of="tasks", rel=REL, floor=0.01)
def accuracy_drop(reading: SuiteReading) -> float:
    """Mean accuracy of the base less that of the model, over the tasks that both were scored on (E-JUST, table 21).

    >>> accuracy_drop(SuiteReading(accuracies={"piqa": 0.5}, base={"piqa": 0.75}))
    0.25
    """
    return reading.drop


@metric("quality.tasks_evaluated", unit="tasks", better="higher", kind="counted", of="tasks")
def tasks_evaluated(reading: SuiteReading) -> float:
    """Tasks that have a score (E-JUST, table 21).

    >>> tasks_evaluated(SuiteReading(accuracies={"piqa": 0.5}))
    1
    """
    return len(reading.accuracies)


def score(
    prepared: "Prepared",
    model: Any,
    tokenizer: Any,
    *,
    limit: int | None = None,
    rows: int | None = None,
    chat: bool = False,
    template: Mapping[str, Any] | None = None,
) -> TaskReading:
    """Score a causal decoder of transformers, in eval mode, on a task; see `score_with`.

    Args:
        rows: sequences in one forward pass, at most; None: by the budget of the device.
        template: arguments of the tokenizer's chat template.
    """
    scorer = scoring.lm_eval.Scorer(model, tokenizer, rows=rows, seed=SEED, template=template)
    return score_with(scorer, prepared, limit=limit, chat=chat)


def score_with(scorer: Any, prepared: "Prepared", *, limit: int | None = None, chat: bool = False) -> TaskReading:
    """Score what answers the requests of lm-eval on a task.

    Args:
        scorer: a `scoring.lm_eval.Scorer`.
        limit: questions of the task, the first ones of each part in proportion to its size; None: all.
        chat: whether prompts are put into the tokenizer's chat template, examples as turns of their own.

    Raises:
        MetricError: the model's logits are not finite.
        DataError: a choice is longer than the model's context, or a tokenizer has not the special token that is needed.
        NotAvailable: the tokenizer has no chat template.
    """
    from lm_eval.evaluator import evaluate

    if chat and not getattr(scorer.tokenizer, "chat_template", None):
        raise NotAvailable("--chat-template: the tokenizer has no chat template")
    task = prepared.task
    questions = prepared.questions(limit)
    parts = {name: prepared.parts[name] for name in questions}
    for part in parts.values():
        part.set_fewshot_seed(seed=SEED)  # the same examples for every model
    found = evaluate(
        lm=scorer,
        task_dict={"tasks": parts, "groups": {}},
        samples=None if limit is None else questions,
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    asked, values = [], []
    for name in parts:
        for sample in found["samples"][name]:
            if sample["filter"] == task.filter:
                asked.append([name, [list(map(str, one)) for one in sample["arguments"]], str(sample["target"])])
                values.append(sample[task.metric])
    return TaskReading(
        task=task,
        data=prepared.data,
        values=tuple(passes(values) if task.runs_code else map(float, values)),
        hashes=hashes_of(asked),
        truncated=scorer.truncated,
        shared=scorer.shared,
        thinking=scorer.thinking.remark,
    )


def suite_of(rows: "Iterable[Row]", recipe: str) -> SuiteReading:
    """What the rows of a run say of a recipe's tasks. Raises NotAvailable where no task was scored."""
    found = [row for row in _scored(rows) if row.recipe == recipe]
    if not found:
        raise NotAvailable("no task was scored")
    base = {row.params["task"]: row.value if row.base_value is None else row.base_value for row in found}
    accuracies = {row.params["task"]: row.value for row in found}
    return SuiteReading(accuracies=accuracies, base=base, compute_dtype=found[-1].compute_dtype)


def _scored(rows: "Iterable[Row]") -> "list[Row]":
    return [row for row in rows if row.metric == "quality.accuracy" and row.value is not None and row.runtime == NATIVE]
