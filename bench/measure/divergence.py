"""The forward divergence of a model from its base, and how often both predict the same token; sums per sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.results.items import Items
from bench.results.row import Input

if TYPE_CHECKING:
    import torch

ROWS = 128  # positions whose probabilities exist at once; their logits do already


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Sums over the scored tokens of each sample, in the order of the data."""

    kl: tuple[float, ...]  # nat
    agreed: tuple[float, ...]  # tokens whose most likely prediction is the base's
    tokens: tuple[int, ...]
    asked: tuple[str, ...] = ()  # hashes of the samples
    params: dict[str, Any] = field(default_factory=dict)  # of the perplexity that was read with it
    inputs: Mapping[str, Input] = field(default_factory=dict)  # and its text

    @property
    def of_itself(self) -> "Divergence":
        """That of the base from itself, by definition."""
        zeros, all_of_them = (0.0,) * len(self.tokens), tuple(map(float, self.tokens))
        return Divergence(kl=zeros, agreed=all_of_them, tokens=self.tokens, asked=self.asked, params=self.params,
                          inputs=self.inputs)  # fmt: skip

    @property
    def items(self) -> dict[str, Items]:
        """Both metrics by sample."""
        return {
            name: Items(self.asked, shares(sums, self.tokens), "real")
            for name, sums in (("quality.kl_to_base", self.kl), ("quality.top1_agreement", self.agreed))
        }


def shares(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, ...]:
    """What each sample adds to the mean over all tokens, times the number of samples: their mean is that mean.

    Where all samples have as many tokens these are the samples' own means.

    >>> shares([1.0, 6.0], [1, 3])
    (0.5, 3.0)
    """
    total = sum(tokens)
    return tuple(each * len(sums) / total for each in sums)


def diverge(base: "torch.Tensor", other: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Divergence of `other` from `base` in nat, and whether both have one most likely token: (positions,) each.

    Both are logits (positions, vocabulary) in fp32; probabilities exist for ROWS positions at a time.
    """
    import torch

    found = []
    for mine, theirs in zip(base.split(ROWS), other.split(ROWS), strict=True):
        p, q = mine.log_softmax(-1), theirs.log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found), base.argmax(-1) == other.argmax(-1)
