"""What the measuring loop adds to a generated token: python benchmarks/loop_overhead.py

A model that returns ready-made logits is decoded by `measure.generation.Decoder` and, beside it, called in a bare loop;
the difference per token is the loop's own. Rounds alternate; medians.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from bench.measure import generation
from bench.measure.generation import _most_likely

TOKENS, ROUNDS, VOCABULARY = 512, 21, 32000


class Ready(torch.nn.Module):
    """Answers every call with the same logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.config = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=2 * TOKENS)
        self.out = SimpleNamespace(logits=torch.randn(1, 1, VOCABULARY))

    def forward(self, **inputs: object) -> SimpleNamespace:
        return self.out


def main() -> None:
    model = Ready()
    generation._static_cache = lambda *_: SimpleNamespace(layers=[])  # none is filled
    decoder = generation.Decoder(model, generation.Load(prompt_tokens=8, new_tokens=TOKENS))
    token = torch.zeros(1, 1, dtype=torch.long)
    ours, bare = [], []
    for _ in range(ROUNDS):
        ours.append(sum(decoder.run().steps_s) / (TOKENS - 1))
        begin = time.perf_counter()
        with torch.inference_mode():
            for _ in range(TOKENS):
                model(input_ids=token, past_key_values=None, use_cache=True, logits_to_keep=1)
        bare.append((time.perf_counter() - begin) / TOKENS)
    overhead = statistics.median(ours) - statistics.median(bare)
    chosen, by_torch = (
        _seconds(choose, model.out.logits) for choose in (_most_likely, lambda each: each[:, -1:].argmax(-1))
    )
    print(f"per token: {1e6 * overhead:.1f} us beyond the model, {1e6 * chosen:.1f} us of it to choose of {VOCABULARY} "
          f"(torch's argmax: {1e6 * by_torch:.1f})")  # fmt: skip


def _seconds(choose: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> float:
    """The median time of one choice."""
    rounds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(TOKENS):
            choose(logits)
        rounds.append((time.perf_counter() - begin) / TOKENS)
    return statistics.median(rounds)


if __name__ == "__main__":
    main()
