"""The table of tasks: number of examples, metric and data source of each.

Each is a configuration of lm-eval that its package brings (`members`, paths under `lm_eval/tasks`), with the shots and
the metric of [E], tables 5 and 7 (`bench.data.tasks.bundled`). Code tasks have configurations of our own
(`scoring.programs`), since the bundled ones fetch their metric from the hub, and so has QuAC (`scoring.quac`),
which lm-eval lacks. Data comes from the hub (what the configuration names), from a folder (`data.tasks.folder`), or
from the embedded reference, whose tasks stand in for the six core ones (`bench.measure.scoring.stand_ins`).

`core` are the six of table 5, `full` all of the Mistral suite: 19 benchmarks in 20 rows, GSM8K being scored greedily by
exact match and by the majority of 8 samples.
"""

import difflib
from dataclasses import dataclass

from bench.errors import OptionError

SEED = 1234  # of few-shot examples that are drawn, and of sampled answers
SETS = ("core", "full", "none")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        title: its name in tables.
        shots: worked examples before each question.
        metric: the name that lm-eval gives it.
        filter: which of the configuration's filters takes the answer out of what was written.
        members: bundled configurations that are scored as one, by the mean over all their items.
        votes: answers sampled to each question, of which the most frequent counts; 1: one greedy answer.
        temperature, top_p: that they are sampled with.
        stand_in: the task of the embedded reference in its place.
        runs_code: whether what the model writes is executed.
        note: where it departs from what [E] says, or what there is of it.
    """

    name: str
    title: str
    shots: int
    metric: str
    filter: str = "none"
    members: tuple[str, ...] = ()
    votes: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    stand_in: str | None = None
    runs_code: bool = False
    core: bool = False
    note: str = ""

    @property
    def column(self) -> str:
        """Its column in tables, as [E] heads them."""
        return f"{self.title} ({self.shots}-shot)"

    @property
    def kind(self) -> str:
        """Of its results by question, `results.items.KINDS`: an F1 is anything from 0 to 1, all else is 0 or 1."""
        return "real" if self.metric == "f1" else "binary"


_ALL = (
    Task(name="hellaswag", title="HellaSwag", shots=0, metric="acc_norm", members=("hellaswag/hellaswag.yaml",),
         stand_in="continuation", core=True),
    Task(name="arc_easy", title="ARC-Easy", shots=0, metric="acc_norm", members=("arc/arc_easy.yaml",),
         stand_in="facts_easy", core=True),
    Task(name="arc_challenge", title="ARC-Challenge", shots=0, metric="acc_norm",
         members=("arc/arc_challenge.yaml",), stand_in="facts_hard", core=True),
    Task(name="gsm8k", title="GSM8K", shots=8, metric="exact_match", filter="strict-match",
         members=("gsm8k/gsm8k.yaml",), stand_in="arithmetic", core=True,
         note="the number behind ####, of examples drawn from the training split"),
    Task(name="mmlu", title="MMLU", shots=5, metric="acc", members=("mmlu/default/mmlu_*.yaml",),
         stand_in="categories", core=True, note="57 subjects, the mean over all questions"),
    Task(name="humaneval", title="HumanEval", shots=0, metric="pass@1", stand_in="code", runs_code=True, core=True),
    Task(name="winogrande", title="Winogrande", shots=0, metric="acc", members=("winogrande/default.yaml",)),
    Task(name="piqa", title="PIQA", shots=0, metric="acc_norm", members=("piqa/piqa.yaml",)),
    Task(name="siqa", title="SIQA", shots=0, metric="acc", members=("siqa/siqa.yaml",)),
    Task(name="openbookqa", title="OpenbookQA", shots=0, metric="acc_norm", members=("openbookqa/openbookqa.yaml",)),
    Task(name="commonsenseqa", title="CommonsenseQA", shots=0, metric="acc",
         members=("commonsense_qa/default.yaml",)),
    Task(name="boolq", title="BoolQ", shots=0, metric="acc", members=("super_glue/boolq/default.yaml",)),
    Task(name="nq_open", title="NaturalQuestions", shots=5, metric="exact_match", filter="remove_whitespace",
         members=("nq_open/nq_open.yaml",)),
    Task(name="triviaqa", title="TriviaQA", shots=5, metric="exact_match", filter="remove_whitespace",
         members=("triviaqa/default.yaml",)),
    Task(name="quac", title="QuAC", shots=0, metric="f1",
         note="the mean F1 over the questions of the validation split whose answers agree; our own configuration"),
    Task(name="math", title="MATH", shots=4, metric="exact_match", filter="maj@4", votes=4, temperature=0.6, top_p=0.95,
         members=("minerva_math/minerva_math_*.yaml",),
         note="Minerva's prompt and samples; the 4 worked examples of its paper"),
    Task(name="gsm8k_maj8", title="GSM8K maj@8", shots=8, metric="exact_match", filter="maj@8", votes=8,
         temperature=0.2, members=("gsm8k/gsm8k-cot-self-consistency.yaml",),
         note="lm-eval's temperature; the 8 worked examples of the chain-of-thought paper"),
    Task(name="mbpp", title="MBPP", shots=3, metric="pass@1", runs_code=True),
    Task(name="bbh", title="BBH", shots=3, metric="exact_match", filter="get-answer",
         members=("bbh/cot_fewshot/*.yaml",),
         note="27 files are the 23 tasks of the paper, two of which come in three sizes each"),
    Task(name="agieval", title="AGIEval", shots=3, metric="acc", members=(
             "agieval/aqua-rat.yaml", "agieval/gaokao-english.yaml", "agieval/logiqa-en.yaml", "agieval/lsat-*.yaml",
             "agieval/sat-*.yaml"),
         note="the 9 multiple-choice files in English, as for Mistral-7B; examples are the first questions of each"),
)  # fmt: skip

SUITE = {task.name: task for task in _ALL}


def choose(text: str) -> list[Task]:
    """The tasks that `--tasks` names: core, full, none, or names separated by commas.

    Raises:
        OptionError: a name is unknown; the message has those like it.
    """
    if text in SETS:
        return [task for task in _ALL if text == "full" or (text == "core" and task.core)]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SUITE:
            near = difflib.get_close_matches(name.lower(), [*SUITE, *SETS], n=3, cutoff=0.5)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            there = ", ".join([*SETS, *SUITE])
            raise OptionError(f"--tasks {name!r} is not a task{hint}; the tasks are {there}")
    return [SUITE[name] for name in dict.fromkeys(names)]
