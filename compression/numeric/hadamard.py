"""Hadamard matrices: entries +1 and -1, orthogonal rows, H H^T = n I; products with them in O(n log n).

    construct(n)        H itself, (n, n)
    transform(x)        x H / sqrt(n) over the last dimension, factor by factor; `back` undoes it
    block_of(n)         the largest size that divides n and can be taken: n itself, or blocks
    random(n, ...)      diag(+-1) H / sqrt(n): orthogonal, and another one for every draw of the signs

Sizes are products of a power of two (Sylvester) and orders that Paley's two constructions give over the fields of p,
p^2 and p^3 elements: 12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 140, 148, 344 ... Kronecker products of Hadamard
matrices are some too, which is why a product with one of them goes factor by factor.

Sources: R. E. A. C. Paley, On orthogonal matrices, 1933; QuaRot, arXiv 2404.00456, section 3 (randomized Hadamard
matrices). Limits: orders that need other constructions (92, 116, 156, 172, 188 ...) are done in blocks of a divisor.
"""

import functools
import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from compression.errors import LayerError

LARGEST = 4096  # of Paley's orders, whose matrices are held as they are


def block_of(size: int) -> int:
    """The largest divisor of `size` of which there is a Hadamard matrix here; 1 where only that is left."""
    small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    return next(n for n in (*(size // n for n in small), *reversed(small)) if factors(n) is not None)


def block_for(size: int, what: str) -> int:
    """As `block_of`. Raises LayerError where nothing would be mixed: no even number divides `size`."""
    block = block_of(size)
    if block == 1:
        raise LayerError(f"{what} has {size} channels, an odd number, of which no Hadamard matrix is made, not even in "
                         "blocks; where it is what down projections read, online=false leaves it as it is")  # fmt: skip
    return block


@functools.cache
def factors(size: int) -> tuple[int, ...] | None:
    """Orders of Paley's and a power of two whose product is `size`, in the order of a Kronecker product; or None."""
    if size & (size - 1) == 0:
        return (size,) if size > 0 else None
    for order in range(4, min(size, LARGEST) + 1, 4):
        if size % order == 0 and order & (order - 1) and _field_of(order) is not None:
            rest = factors(size // order)
            if rest is not None:
                return (*(n for n in rest if n > 1), order)
    return None


def construct(size: int) -> Tensor:
    """H, fp64 (size, size). Raises LayerError: none is known here."""
    orders = factors(size)
    if orders is None:
        raise LayerError(f"no Hadamard matrix of size {size} is made here; the largest divisor that has one is "
                         f"{block_of(size)}")  # fmt: skip
    return functools.reduce(torch.kron, map(_factor, orders)).clone()


def transform(x: Tensor, block: int | None = None, *, transposed: bool = False) -> Tensor:
    """x H / sqrt(n) on each block of n channels of x (..., cols), or x H^T / sqrt(n); 16 bits are computed in fp32.

    Raises:
        LayerError: there is no Hadamard matrix of that size, or blocks of it do not tile the channels.
    """
    cols = x.shape[-1]
    size = cols if block is None else block
    orders = factors(size)
    if orders is None or cols % size:
        raise LayerError(f"a Hadamard transform in blocks of {size} cannot be taken of {cols} channels; blocks of "
                         f"{block_of(cols)} can")  # fmt: skip
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, size)
    behind = size
    for order in orders:  # (H_a (x) H_b) is H_a over the slow index and H_b over the fast one
        behind //= order
        y = wide.reshape(-1, order, behind)
        wide = (_sylvester(y) if order & (order - 1) == 0 else _dense(order, y, transposed)).reshape(-1, size)
    return (wide / math.sqrt(size)).reshape(x.shape).to(x.dtype)


def back(x: Tensor, block: int) -> Tensor:
    """The inverse of `transform`, which is its transpose."""
    return transform(x, block, transposed=True)


def random(size: int, generator: torch.Generator) -> Tensor:
    """diag(signs) H / sqrt(n), fp64 (size, size); where there is no H of the whole size, of `block_of` it in blocks."""
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    return transform(torch.diag(signs), block_of(size))


def random_rotations(width: int, heads: Iterable[int], seed: int) -> tuple[Tensor, list[Tensor]]:
    """One of the residual stream, and one for each size of heads."""
    generator = torch.Generator().manual_seed(seed)
    return random(width, generator), [random(size, generator) for size in heads]


def _sylvester(y: Tensor) -> Tensor:
    """H_{2^k} over dimension 1 of y (n, 2^k, m): butterflies."""
    half = 1
    while half < y.shape[1]:
        pairs = y.reshape(y.shape[0], -1, 2, half, y.shape[2])
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack([first + second, first - second], 2).reshape(y.shape)
        half *= 2
    return y


def _dense(order: int, y: Tensor, transposed: bool) -> Tensor:
    """H of one of Paley's orders, or its transpose, over dimension 1 of y (n, order, m)."""
    matrix = _factor(order).to(y.device, y.dtype)
    return torch.einsum("nim,ij->njm", y, matrix.T if transposed else matrix)


@functools.cache
@torch.inference_mode(False)  # kept for those who take gradients too
def _factor(order: int) -> Tensor:
    """H of one of the numbers that `factors` gives."""
    if order & (order - 1) == 0:
        return functools.reduce(torch.kron, [torch.tensor([[1.0, 1], [1, -1]]).double()] * (order.bit_length() - 1),
                                torch.ones(1, 1).double())  # fmt: skip
    field = _field_of(order)
    assert field is not None
    q = _jacobsthal(*field)
    ones = torch.ones(len(q), 1).double()
    if field[0] ** field[1] % 4 == 3:  # Paley I: I + S, S skew
        skew = torch.cat([torch.cat([torch.zeros(1, 1).double(), ones.T], 1), torch.cat([-ones, q], 1)])
        return skew + torch.eye(order).double()
    conference = torch.cat([torch.cat([torch.zeros(1, 1).double(), ones.T], 1), torch.cat([ones, q], 1)])
    one, other = torch.tensor([[1.0, 1], [1, -1]]).double(), torch.tensor([[1.0, -1], [-1, -1]]).double()
    return torch.kron(conference, one) + torch.kron(torch.eye(order // 2).double(), other)  # Paley II


@functools.cache
def _field_of(order: int) -> tuple[int, int] | None:
    """(p, k) of a field of q = p^k elements, k up to 3, with order = q + 1, q = 3 mod 4, or 2 (q + 1), q = 1 mod 4."""
    for q, left in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and q % 4 == left and (found := _prime_power(q)) is not None:
            return found
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    if q < 3:
        return None
    p = next((n for n in range(2, math.isqrt(q) + 1) if q % n == 0), q)
    return next(((p, k) for k in (1, 2, 3) if p**k == q), None)


def _jacobsthal(p: int, k: int) -> Tensor:
    """Q of the field of p^k elements: Q_ij = 1 where a_i - a_j is a square, -1 where it is none, 0 for i = j."""
    elements = torch.cartesian_prod(*[torch.arange(p)] * k).view(-1, k)  # coefficients, the highest one first
    weights = p ** torch.arange(k - 1, -1, -1)
    product = torch.zeros(len(elements), 2 * k - 1, dtype=torch.int64)
    for i, j in itertools.product(range(k), range(k)):
        product[:, i + j] += elements[:, i] * elements[:, j]
    lowest = torch.tensor(_irreducible(p, k))
    for i in range(k - 1):  # x^k is -(its lower terms), which takes the highest power away
        product[:, i + 1 : i + 1 + k] -= product[:, i : i + 1] * lowest
    squares = torch.full((len(elements),), -1.0).double()
    squares[((product[:, -k:] % p) * weights).sum(1)] = 1
    squares[0] = 0
    return squares[((elements[:, None] - elements[None]) % p * weights).sum(-1)]


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Lower coefficients of a polynomial of degree k up to 3, monic, that has no root among 0 .. p - 1 (k = 1: x)."""
    if k == 1:
        return (0,)
    return next(
        lower for lower in itertools.product(range(p), repeat=k)
        if all((x**k + sum(c * x ** (k - 1 - i) for i, c in enumerate(lower))) % p for x in range(p))
    )  # fmt: skip
