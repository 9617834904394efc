"""Experts of a mixture as MLPs of linear layers, in the place of transformers' tensors of all experts together."""

from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One expert, down(between(gate(x), up(x))); `between` is act(gate) * up, or gpt-oss's clamped form of it."""

    def __init__(self, whole: Any):
        super().__init__()
        hidden, inner = _sizes(whole)
        bias = hasattr(whole, "down_proj_bias")
        make = {"bias": bias, "device": "meta", "dtype": whole.down_proj.dtype}
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, **make), nn.Linear(hidden, inner, **make)
        self.down_proj = nn.Linear(inner, hidden, **make)
        self.act_fn = getattr(whole, "act_fn", None)
        self.alpha, self.limit = getattr(whole, "alpha", None), getattr(whole, "limit", None)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.act_fn is not None:
            return self.down_proj(self.act_fn(gate) * up)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)  # type: ignore[operator]
        return self.down_proj((up + 1) * gate * torch.sigmoid(gate * self.alpha))


class Experts(nn.ModuleList):
    """All experts of a block by number; called as transformers' are."""

    def __init__(self, whole: Any):
        super().__init__(Expert(whole) for _ in range(whole.num_experts))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the outputs of each token's experts by their weights.

        Args:
            hidden_states: (tokens, width).
            top_k_index, top_k_weights: (tokens, experts of each).
        """
        summed = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            tokens, places = torch.where(top_k_index == number)
            out = self[number](hidden_states[tokens]) * top_k_weights[tokens, places, None]
            summed.index_add_(0, tokens, out.to(summed.dtype))
        return summed


def _sizes(whole: Any) -> tuple[int, int]:
    """Width of the stream, and neurons of an expert."""
    if hasattr(whole, "hidden_size"):  # gpt-oss
        return whole.hidden_size, whole.intermediate_size
    return whole.hidden_dim, whole.intermediate_dim
