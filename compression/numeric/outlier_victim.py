"""Outlier-victim pairs: numbers in 4 bits, where a number out of range takes the place of its neighbour as well.

A row is cut into pairs of neighbours. In units of the scale a number is

    normal     a whole number from -7 to 7              code: its lowest four bits
    outlier    12, 16, 24, 32, 48, 64 or 96, or less 0  code: sign * 8 + place, from 1
    victim     0, the neighbour of an outlier           code: 8, which no other number has at its place

A number is an outlier where the nearest of all levels is one of those; of two in a pair the larger stays. A pair is a
byte, the code of the first number in its lower half.

Source: OliVe, arXiv 2304.07493, sections 3 and 4 (abfloat with two bits of exponent, one of mantissa and a bias that
begins behind the normal numbers); scales are searched for from 75 to 150 % of what three standard deviations are.
Departure: of two outliers the authors' code keeps the first; here, as in the paper, it is the larger.
"""

import itertools

import torch
from torch import Tensor

from compression.errors import LayerError

OUTLIERS = (12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)
NORMAL = 7  # the largest
VICTIM = 8  # the code
_FIRST = (NORMAL + OUTLIERS[0]) / 2  # above it a number is nearer to an outlier
_BETWEEN = tuple((low + high) / 2 for low, high in itertools.pairwise(OUTLIERS))
SHARES = tuple(0.75 + 0.02 * step for step in range(38))  # of mean and three standard deviations, up to 1.49


def check_pairs(cols: int) -> None:
    """Raise LayerError if a row has no whole number of pairs."""
    if cols % 2:
        raise LayerError(f"its {cols} inputs must be an even number: they are rounded in pairs")


def rounded(values: Tensor) -> Tensor:
    """The levels that numbers (..., cols) in units of the scale become, fp32.

    >>> rounded(torch.tensor([1.2, -3.6, 0.5, 13.0, 40.0, -90.0])).tolist()
    [1.0, -4.0, 0.0, 12.0, 0.0, -96.0]
    """
    first, second = _pairs(values)
    outlying, other = _stay(first, second)
    return torch.stack(
        [_level(first, outlying).masked_fill_(other, 0), _level(second, other).masked_fill_(outlying, 0)], -1
    ).view(values.shape)


def encode(values: Tensor) -> Tensor:
    """Bytes, uint8 (..., cols / 2), of numbers (..., cols) in units of the scale."""
    first, second = _pairs(values)
    outlying, other = _stay(first, second)
    low = _code(first, outlying).masked_fill_(other, VICTIM)
    return low | (_code(second, other).masked_fill_(outlying, VICTIM) << 4)


def decode(codes: Tensor) -> Tensor:
    """The inverse: fp32 (..., cols) levels of bytes (..., cols / 2)."""
    return _table(codes.device)[codes.int()].flatten(-2)


def sound(codes: Tensor) -> bool:
    """Whether all bytes are those of pairs: one victim at most, and beside it an outlier."""
    return not _table(codes.device)[codes.int()].isnan().any()


def fit(values: Tensor) -> Tensor:
    """The scale of each row, fp32 (rows,), for numbers (rows, cols): that of the least squared error in `SHARES`."""
    x = values.detach().float()
    mean, spread = x.mean(-1), 3 * x.std(-1, correction=0)
    reach = torch.maximum((mean + spread).abs(), (mean - spread).abs())
    reach = torch.where(reach > 0, reach, torch.full_like(reach, NORMAL / SHARES[0]))  # a scale of 1
    best, least = torch.ones_like(reach), torch.full_like(reach, torch.inf)
    for share in SHARES:
        scales = share * reach / NORMAL
        error = rounded(x / scales[:, None]).mul_(scales[:, None]).sub_(x).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def _pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    check_pairs(values.shape[-1])
    first, second = values.float().unflatten(-1, (-1, 2)).unbind(-1)
    return first, second


def _stay(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the first, and of the second numbers of pairs stay as outliers."""
    large, other = first.abs(), second.abs()
    outlying = (large > _FIRST) & (large >= other)
    return outlying, (other > _FIRST) & ~outlying


def _places(values: Tensor) -> Tensor:
    """Of the nearest outliers."""
    return torch.bucketize(values.abs(), torch.tensor(_BETWEEN, device=values.device))


def _level(values: Tensor, outlying: Tensor) -> Tensor:
    outliers = torch.tensor(OUTLIERS, device=values.device)[_places(values)].copysign(values)
    return torch.where(outlying, outliers, values.round().clamp(-NORMAL, NORMAL))


def _code(values: Tensor, outlying: Tensor) -> Tensor:
    outliers = _places(values) + 1 + 8 * torch.signbit(values)
    normal = values.round().clamp(-NORMAL, NORMAL).to(torch.int8).view(torch.uint8) & 15
    return torch.where(outlying, outliers.to(torch.uint8), normal)


def _table(device: torch.device) -> Tensor:
    """By byte the two numbers, fp32 (256, 2); NaN for bytes that are no pair."""
    normal = torch.tensor([*range(8), torch.nan, *range(-NORMAL, 0)], dtype=torch.float32, device=device)
    outliers = torch.tensor([torch.nan, *OUTLIERS], device=device)
    outliers = torch.cat([outliers, -outliers])
    byte = torch.arange(256, device=device)
    low, high = byte & 15, byte >> 4
    first = torch.where(high == VICTIM, outliers[low], torch.where(low == VICTIM, 0, normal[low]))
    second = torch.where(low == VICTIM, outliers[high], torch.where(high == VICTIM, 0, normal[high]))
    both = (low == VICTIM) & (high == VICTIM)
    return torch.stack([first, second], -1).masked_fill(both[:, None], torch.nan)
