"""Gradient descent on orthogonal matrices, which stay orthogonal: Cayley SGD.

A step takes R, orthogonal, with gradient g of the loss, along the curve Y(t) = (I - t/2 A)^-1 (I + t/2 A) R^T with
A skew: orthogonal for every t, and downhill at t = 0. The inverse is not taken: Y = R^T + t/2 A (R^T + Y) is put in for
itself, which converges for t |A| below 2.

Source: arXiv 2002.01113, algorithm 1, as SpinQuant, arXiv 2405.16406, section 3.2, takes it: t is the learning rate, or
1/|A|_1 where that is less. Departure: what the iteration leaves over is taken out at once, by Newton's iteration for
the nearest orthogonal matrix, where the authors take a QR decomposition once in about a hundred steps.
"""

import torch
from torch import Tensor

ITERATIONS = 5
NEWTON_STEPS = 3


def cayley_step(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The next matrix.

    Args:
        rotation: R (n, n), orthogonal; fp64 to stay so over many steps.
        gradient: of the loss by R.
    """
    skew, start = skew_of(rotation, gradient.to(rotation.dtype)), rotation.mT
    t = min(rate, 1 / max(float(torch.linalg.matrix_norm(skew, 1)), 1e-12))
    turned = start + t * (skew @ start)
    for _ in range(ITERATIONS):
        turned = start + t / 2 * (skew @ (start + turned))
    return nearest_orthogonal(turned.mT)


def skew_of(rotation: Tensor, gradient: Tensor) -> Tensor:
    """A = W - W^T of W = V R - 1/2 R^T (R V R), where V = -g^T: without momentum, as the authors have it."""
    moved = -gradient.mT @ rotation
    wide = moved - rotation.mT @ (rotation @ moved) / 2
    return wide - wide.mT


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """That of a matrix that nearly is: R (3 I - R^T R) / 2, in which an error becomes its square, three times."""
    three = 3 * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(NEWTON_STEPS):
        matrix = matrix @ (three - matrix.mT @ matrix) / 2
    return matrix
