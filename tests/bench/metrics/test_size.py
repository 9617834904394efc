"""Metrics of size: what is counted as a zero, and what is left of the base."""

import pytest
import torch
from packed_layers import sparse_linear
from torch import nn

from bench.metrics.size import ArtefactReading, sparsity, zeros


def test_zeros_are_counted_in_dense_and_sparse_layers_alike():
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 4.0, 5.0]])
    dense = nn.Linear(4, 2, bias=False)
    dense.weight = nn.Parameter(weight)
    counted = [zeros(nn.Sequential(layer)) for layer in (dense, sparse_linear(weight, None))]

    assert [3, 3] == counted
    reading = ArtefactReading(stored_bytes=1, parameters=8, base_stored_bytes=1, base_parameters=16, zeros=3)
    assert sparsity(reading) == pytest.approx(11 / 16)
