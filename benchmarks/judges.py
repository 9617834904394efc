"""Whether a local judge tells right answers from wrong ones: the area under the ROC curve (AUROC) of its scores.

    python benchmarks/judges.py [--judge SPEC ...] [--questions 60]

The right answers to questions of the embedded reference, each about its own manual, against two kinds of wrong ones:
`other`, the right answer to the question about another device that has most words in common, and `same`, the right
answer to another question about the same manual (for the questions that have one). 1 is a judge that scores every right
answer above every wrong one, 0.5 one that knows nothing. The steps are written by the judge itself, as in a run.

Below that, for vectors that coherence could be the cosine of: the answer's with its own manual against that with the
other device's, by TF-IDF of words and by the mean of the teacher's last hidden states.
"""

import argparse
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import torch

from bench.data.collections.readers import embedded
from bench.measure.judge import clarity, g_eval
from bench.measure.judge.answers import Answered, Asked, questions_of
from bench.measure.judge.likelihood import likelihoods
from bench.measure.judge.local import LocalJudge


def auroc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """Share of the pairs of a right and a wrong answer where the right one has the higher score; ties count half."""
    ranked = sorted(wrong)
    below = sum(bisect_left(ranked, value) + bisect_right(ranked, value) for value in right)
    return below / (2 * len(right) * len(wrong))


def nearest(asked: Asked, among: Sequence[Asked]) -> Asked:
    """The question with another answer and another manual that has most words in common."""
    words = set(asked.question.split())
    others = [each for each in among if each.truths[0] != asked.truths[0] and each.context != asked.context]
    return max(others, key=lambda other: len(words & set(other.question.split())))


def pooled(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """The mean of a text's last hidden states, of length 1."""
    ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
    with torch.inference_mode():
        state = model.get_decoder()(input_ids=ids).last_hidden_state[0].float().mean(0)
    return state / state.norm()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="append", metavar="SPEC", help="default reference-teacher")
    parser.add_argument("--questions", type=int, default=60)
    options = parser.parse_args()
    specs = options.judge or ["reference-teacher"]
    judges = {spec: LocalJudge(spec) for spec in dict.fromkeys(["reference-teacher", *specs])}
    model, tokenizer = judges["reference-teacher"].opened
    every = questions_of(embedded(), tokenizer)
    asked = every[: options.questions]
    right = [Answered(each, each.truths[0]) for each in asked]
    near = [nearest(each, every) for each in asked]
    wrong = {"other": [Answered(each, other.truths[0]) for each, other in zip(asked, near, strict=True)], "same": []}
    for each in asked:
        told = [o.truths[0] for o in every if o.context == each.context and o.truths[0] != each.truths[0]]
        wrong["same"] += [Answered(each, told[0])] if told else []
    print(f"{len(right)} right answers, {len(wrong['other'])} wrong of `other`, {len(wrong['same'])} of `same`")
    print(f"{'judge':24}{'score':20}{'other':>8}{'same':>8}")

    def line(judge: str, score: str, rated: Sequence[Sequence[float]]) -> None:
        print(f"{judge:24}{score:20}" + "".join(f"{auroc(rated[0], each):8.3f}" for each in rated[1:]))

    groups = [right, wrong["other"], wrong["same"]]
    for spec in specs:
        judge = judges[spec]
        steps = g_eval.write_steps(judge)
        verdicts = [g_eval.judged(judge, steps, group) for group in groups]
        for name in steps:
            line(spec, f"G-Eval {name}", [[g_eval.score(v) for v in each[name] if v.valid] for each in verdicts])
        line(spec, "likelihood", [likelihoods(*judge.opened, group, form="reference") for group in groups])

    swapped = [Answered(other, each.text) for other, each in zip(near, right, strict=True)]
    weights = clarity.tf_idf([each.context for each in every])
    ways = {
        "TF-IDF": lambda one: clarity.cosine(weights(one.text), weights(one.asked.context)),
        "hidden states": lambda one: float(pooled(model, tokenizer, one.text) @ pooled(model, tokenizer,
                                                                                        one.asked.context)),
    }  # fmt: skip
    print(f"\n{'vectors':24}own manual against the other device's")
    for name, cosine in ways.items():
        print(f"{name:24}{auroc(*([cosine(each) for each in group] for group in (right, swapped))):.3f}")


if __name__ == "__main__":
    main()
