"""k-means against a slow search, and its laws."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from compression.numeric.clusters import k_means


def drawn(seed, count):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def spread(points, index):
    return sum(float((points[index == i] - points[index == i].mean(0)).square().sum()) for i in index.unique())


@given(seeds, st.integers(1, 40), st.integers(1, 12))
def test_each_point_is_of_one_cluster_and_numbers_follow_the_centres(seed, count, clusters):
    points = drawn(seed, count)

    index = k_means(points, clusters)

    assert index.unique().tolist() == list(range(min(clusters, count)))
    centres = torch.stack([points[index == i, 0].double().mean() for i in index.unique()])
    assert (centres[1:] >= centres[:-1]).all()
    assert torch.equal(index, k_means(points, clusters))


@given(seeds)
def test_two_clusters_of_few_points_are_the_best_there_are(seed):
    points = drawn(seed, 7)
    best = min(spread(points, torch.tensor(each)) for each in itertools.product((0, 1), repeat=7) if 0 < sum(each) < 7)

    assert best * 1.1 + 1e-6 >= spread(points, k_means(points, 2))


def test_points_on_each_other_are_of_one_cluster():
    assert [0, 0, 0, 0] == k_means(torch.ones(4, 2), 3).tolist()
    assert [0, 0, 1, 1] == k_means(torch.tensor([[1.0, 0], [1, 0], [5, 0], [5, 0]]), 3).tolist()
