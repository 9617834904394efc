"""How likely a local model holds an answer to be, given the paragraph and the question: a judge that follows no
instruction, and is not G-Eval.

    likelihood = exp(mean log-probability of the answer's tokens)

The geometric mean of their probabilities, 0 to 1, as in BARTScore (Yuan et al. 2021, arXiv 2106.11520) and GPTScore (Fu
et al. 2023, arXiv 2302.04166), whose scores are its logarithm. The end of the answer counts as a token, so an answer
that stops too early or goes on is less likely. It is as good as the model is at the task, and it favours what that
model would have said.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.measure import scoring
from bench.measure.judge.answers import Answered, prompt


def likelihoods(
    model: Any, tokenizer: Any, answers: Sequence[Answered], *, form: str, template: Mapping[str, Any] | None = None
) -> list[float]:
    """The likelihood of every answer after its prompt, as this model reads it.

    Args:
        form: that of the collection.
        template: arguments of the tokenizer's chat template.

    An empty answer has the likelihood of ending at once.
    """
    end = "\n" if form == "reference" else tokenizer.eos_token or "\n"
    lead = "" if tokenizer.chat_template and form != "reference" else " "
    prompts = [prompt(each.asked.question, each.asked.context, form, tokenizer, template) for each in answers]
    texts = [f"{lead if each.text else ''}{each.text}{end}" for each in answers]
    return [math.exp(mean) for mean in scoring.lm_eval.Scorer(model, tokenizer).mean_logprobs(prompts, texts)]
