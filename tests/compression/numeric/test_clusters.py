"""The laws of k-means."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from compression.numeric.clusters import k_means


def drawn(seed, count):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.integers(1, 40), st.integers(1, 12))
def test_each_point_is_of_one_cluster_and_numbers_follow_the_centres(seed, count, clusters):
    points = drawn(seed, count)

    index = k_means(points, clusters)

    assert index.unique().tolist() == list(range(min(clusters, count)))
    centres = torch.stack([points[index == i, 0].double().mean() for i in index.unique()])
    assert (centres[1:] >= centres[:-1]).all()
    assert torch.equal(index, k_means(points, clusters))


@given(seeds, st.integers(2, 4))
def test_each_point_is_nearest_to_the_centre_of_its_own_cluster(seed, count):
    points = drawn(seed, 7).double()
    index = k_means(points, count)
    centres = torch.stack([points[index == number].mean(0) for number in range(int(index.max()) + 1)])
    distances = torch.cdist(points, centres)

    assert (distances[torch.arange(7), index] <= distances.amin(-1) + 1e-9).all()


@given(seeds)
def test_clusters_that_lie_apart_are_found(seed):
    apart = torch.tensor([0, 1, 0, 2, 1, 2, 0])
    points = drawn(seed, 7) + 1000 * apart[:, None]

    assert torch.equal(apart, k_means(points, 3))


def test_points_on_each_other_are_of_one_cluster():
    assert [0, 0, 0, 0] == k_means(torch.ones(4, 2), 3).tolist()
    assert [0, 0, 1, 1] == k_means(torch.tensor([[1.0, 0], [1, 0], [5, 0], [5, 0]]), 3).tolist()
