"""k-means of points, by Lloyd's steps from several starts."""

import torch
from torch import Tensor

STARTS, STEPS = 10, 100


def k_means(points: Tensor, count: int, seed: int = 0) -> Tensor:
    """The cluster of each point, int64 (n,), numbered by the first coordinate of their centres and without gaps: of the
    starts that with the least squared distance to the centres.

    Points that lie on each other are of one cluster, so that there may be fewer than `count`. In fp64 on the CPU, with
    a generator of its own, so that the result depends on nothing but the arguments.

    Args:
        points: (n, dimensions).
    """
    x = points.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    least, best = torch.inf, torch.zeros(len(x), dtype=torch.int64)
    for _ in range(STARTS if 1 < count < len(x) else 1):
        index, distance = _lloyd(x, _spread(x, min(count, len(x)), generator))
        if distance < least:
            least, best = distance, index
    return _ordered(x, best)


def _spread(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Some of the points, each drawn by its squared distance to those before it (k-means++)."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    far = (x - x[chosen[0]]).square().sum(-1)
    while len(chosen) < count and far.sum() > 0:
        chosen.append(int(torch.multinomial(far, 1, generator=generator)))
        far = torch.minimum(far, (x - x[chosen[-1]]).square().sum(-1))
    return x[chosen]


def _lloyd(x: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    index = torch.full((len(x),), -1)
    for _ in range(STEPS):
        distances = torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.argmin(-1)
        if torch.equal(nearest, index):
            break
        index = nearest
        members = torch.bincount(index, minlength=len(centres))[:, None]
        means = torch.zeros_like(centres).index_add_(0, index, x) / members.clamp(min=1)
        centres = torch.where(members > 0, means, centres)
    return index, float((x - centres[index]).square().sum())


def _ordered(x: Tensor, index: Tensor) -> Tensor:
    numbers = index.unique()
    means = torch.stack([x[index == number, 0].mean() for number in numbers])
    places = torch.empty(int(numbers.max()) + 1, dtype=torch.int64)
    places[numbers[means.argsort()]] = torch.arange(len(numbers))
    return places[index]
