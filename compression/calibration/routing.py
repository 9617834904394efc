"""Which calibration tokens reach the experts of a mixture, and what becomes of experts that few of them reach."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures.decoder import Block
from compression.workers import Workers


@dataclass
class Routed:
    """Tokens by expert; a starved one, to which fewer tokens are routed than it has inputs, is shown all.

    A Hessian of fewer tokens than inputs is singular, and of no token there is nothing to fit.

    Attributes:
        counts: by path of the expert in the block, how many tokens were routed to it.
        total: tokens that passed the block.
        inputs: of an expert.
    """

    counts: dict[str, int] = field(default_factory=dict)
    total: int = 0
    inputs: int = 0

    @property
    def starved(self) -> list[str]:
        """Paths of the experts that saw fewer tokens than they have inputs, though there were more to see."""
        return [path for path, count in self.counts.items() if count < min(self.inputs, self.total)]

    def words(self, path: str) -> str:
        """For reports, what an expert saw, of which `path` is a layer in the block; nothing for other layers."""
        expert = next((each for each in self.counts if path.startswith(f"{each}.")), None)
        if expert is None:
            return ""
        said = f", {self.counts[expert]} of {self.total} calibration tokens routed to it"
        return said + (f", fewer than its {self.inputs} inputs: fitted to all of them" * (expert in self.starved))


class Routing:
    """Counts what `module`, a copy of the block's, routes to experts; shows the starved ones what passed them by.

    What is routed is held until then: as much again as the hidden states of the text.
    """

    def __init__(self, block: Block, module: nn.Module):
        self.routed, experts = Routed(), block.mlp.experts
        self.passed: list[tuple[Tensor, Tensor]] = []  # of each sample its hidden states, and the experts chosen
        if experts is None:
            return
        self._layer: Any = module.get_submodule(experts.path)
        self._paths = [f"{experts.path}.{number}" for number in range(len(self._layer))]
        self.routed.inputs = self._layer[0].get_submodule(block.mlp.readers[0]).in_features
        self._layer.register_forward_pre_hook(lambda _, arguments: self.passed.append(arguments[:2]))

    def count(self, workers: Workers) -> None:
        """Add up the tokens of all samples, those of other processes included."""
        if not self.routed.inputs:
            return
        here = torch.zeros(1 + len(self._paths), dtype=torch.int64)
        for hidden, chosen in self.passed:
            here[0] += len(hidden)
            here[1:] += chosen.flatten().bincount(minlength=len(self._paths)).cpu()  # a token names an expert once
        self.routed.total, *counts = torch.stack(workers.everyone(here)).sum(0).tolist()
        self.routed.counts = dict(zip(self._paths, counts, strict=True))

    def show_rest(self, sample: int) -> None:
        """Run the starved experts on those tokens of a sample that were not routed to them."""
        for path in self.routed.starved:
            number, (hidden, chosen) = self._paths.index(path), self.passed[sample]
            rest = hidden[~(chosen == number).any(-1)]
            if len(rest):
                self._layer[number](rest)
