"""Which calibration tokens reach the experts of a mixture, and what becomes of experts that few of them reach."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compression.architectures.decoder import Block


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


@contextmanager
def counting(block: Block, module: nn.Module) -> Iterator[Routed]:
    """Counts while `module`, a copy of the block's, runs; then shows starved experts the tokens that passed by.

    What is routed is held until then: as much again as the hidden states of the text.
    """
    routed, experts = Routed(), block.mlp.experts
    if experts is None:
        yield routed
        return
    layer: Any = module.get_submodule(experts.path)
    paths = [f"{experts.path}.{number}" for number in range(len(layer))]
    routed.counts, routed.inputs = dict.fromkeys(paths, 0), layer[0].get_submodule(block.mlp.readers[0]).in_features
    passed: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        passed.append(arguments[:2])

    handle = layer.register_forward_pre_hook(note)
    try:
        yield routed
    finally:
        handle.remove()
    routed.total = sum(len(hidden) for hidden, _ in passed)
    for _, chosen in passed:  # a token names an expert once
        for path, count in zip(paths, chosen.flatten().bincount(minlength=len(paths)).tolist(), strict=True):
            routed.counts[path] += count
    for path in routed.starved:
        number = paths.index(path)
        for hidden, chosen in passed:
            rest = hidden[~(chosen == number).any(-1)]
            if len(rest):
                layer[number](rest)
