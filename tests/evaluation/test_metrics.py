from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twostep.evaluation.metrics import (
    frechet_distance,
    gap_closed,
    gaussian_distance,
    kernel_distance,
    neighbourhoods,
    paired_distance,
    pairwise_diversity,
    vendi_score,
)


def exact_gaussian(count: int, mean: Tensor, covariance: Tensor, seed: int = 0) -> Tensor:
    """(count, D) with exactly this sample mean and covariance; count > D."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    white, _ = torch.linalg.qr(draws - draws.mean(0))  # orthonormal columns of mean 0
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return mean + white * math.sqrt(count - 1) @ root


def rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_frechet_of_covariances_that_commute() -> None:
    basis = rotation(4, seed=3)
    variances_a, variances_b = double([1, 4, 9, 0.25]), double([4, 4, 1, 1])
    mean_a, mean_b = double([0, 1, 2, 3]), double([2, 1, 0, 3])
    a = exact_gaussian(50, mean_a, basis @ variances_a.diag() @ basis.T, seed=1)
    b = exact_gaussian(70, mean_b, basis @ variances_b.diag() @ basis.T, seed=2)
    # |mean difference|^2 = 8; differences of standard deviations: 1, 0, 2, 1/2.
    assert frechet_distance(a, b) == pytest.approx(8 + 1 + 4 + 0.25, rel=1e-10)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    first = double([4, 0, 0, 1]).reshape(2, 2)
    second = double([2, 1, 1, 2]).reshape(2, 2)
    a = exact_gaussian(30, torch.zeros(2, dtype=torch.float64), first, seed=1)
    b = exact_gaussian(30, torch.zeros(2, dtype=torch.float64), second, seed=2)
    # 2x2: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), here of first @ second.
    trace_of_root = math.sqrt(10 + 2 * math.sqrt(12))
    assert frechet_distance(a, b) == pytest.approx(5 + 4 - 2 * trace_of_root, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_frechet_of_fewer_images_than_features() -> None:
    # One line each, at right angles: neither covariance sees the other's.
    a, b = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64)
    a[:, 0], b[:, 1] = double([-1, 1]), double([-3, 0, 3])
    assert frechet_distance(a, b) == pytest.approx(2 + 9, rel=1e-12)
    b[:, 1], b[:, 0] = 0, double([-3, 0, 3])  # along one line: (3 - sqrt 2)^2
    assert frechet_distance(a, b) == pytest.approx((3 - math.sqrt(2)) ** 2, rel=1e-12)


@pytest.mark.parametrize(("count", "features"), [(200, 8), (20, 96), (2, 3), (5, 1)])
def test_frechet_of_a_set_with_itself_is_zero(count: int, features: int) -> None:
    a = 10 * torch.randn(count, features, dtype=torch.float64) + 5
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


def test_frechet_of_constant_features() -> None:
    a, b = torch.zeros(4, 3), torch.ones(4, 3)
    assert frechet_distance(a, b) == 3


def test_kernel_distance_by_hand() -> None:
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def kernel(x: Tensor, y: Tensor) -> float:
        product = sum(float(p * q) for p, q in zip(x, y, strict=True))
        return (product / 3 + 1) ** 3

    within_a = [kernel(x, y) for x, y in itertools.permutations(a, 2)]
    within_b = [kernel(x, y) for x, y in itertools.permutations(b, 2)]
    across = [kernel(x, y) for x, y in itertools.product(a, b)]
    expected = sum(within_a) / 12 + sum(within_b) / 20 - 2 * sum(across) / 20
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_one_and_of_two_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1500, 8, generator=generator, dtype=torch.float64)
    same, other = kernel_distance(a, b), kernel_distance(a, b + 0.5)
    assert abs(same) < 0.01
    assert other > 0.2


def test_kernel_distance_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 2, 10, 4, generator=generator, dtype=torch.float64)
    values = double([kernel_distance(a, b) for a, b in draws])
    assert values.min() < 0
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))


def test_kernel_distances_of_equal_models_on_equal_prompts_are_zero_only_with_groups() -> None:
    """Two images per prompt; prompts differ far more than the images of one."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(30).repeat(2)
    for distance in (kernel_distance, gaussian_distance):
        with_groups, without = [], []
        for _ in range(60):
            prompts = torch.randn(30, 3, generator=generator, dtype=torch.float64).repeat(2, 1)
            draws = 0.3 * torch.randn(2, 60, 3, generator=generator, dtype=torch.float64)
            a, b = prompts + draws[0], prompts + draws[1]
            with_groups.append(distance(a, b, groups))
            without.append(distance(a, b))
        fair, biased = double(with_groups), double(without)
        assert abs(fair.mean()) < 4 * fair.std() / math.sqrt(60)
        assert biased.mean() < -8 * biased.std() / math.sqrt(60)
    a, b = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    pairs = [(0, 1), (1, 0), (0, 3), (3, 0), (2, 1), (1, 2), (2, 3), (3, 2)]  # groups 0 1 0 1

    def mean(x: Tensor, y: Tensor) -> float:
        return sum(float(x[i] @ y[j] / 2 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert kernel_distance(a, b, torch.tensor([0, 1, 0, 1])) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="one entry per image"):
        kernel_distance(a, b[:3], torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="no pair is left"):
        kernel_distance(a, b, torch.zeros(4, dtype=torch.int64))


def test_gaussian_distance_by_hand() -> None:
    a, b = double([0, 2]).reshape(2, 1), double([0, 1, 3]).reshape(3, 1)
    width = 2.0**2  # median of 1, 2, 3

    def kernel(distance: float) -> float:
        return math.exp(-(distance**2) / (2 * width))

    within = kernel(2) + (kernel(1) + kernel(3) + kernel(2)) / 3
    across = sum(kernel(d) for d in (0, 1, 3, 2, 1, 1)) / 6
    assert gaussian_distance(a, b) == pytest.approx(1000 * (within - 2 * across), rel=1e-9)
    # Only the reference sets the width, so that the scale of the features does not matter.
    assert gaussian_distance(7 * a, 7 * b) == pytest.approx(gaussian_distance(a, b), rel=1e-9)


def test_gaussian_distance_of_one_and_of_two_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1500, 8, generator=generator, dtype=torch.float64)
    assert abs(gaussian_distance(a, b)) < 1
    assert gaussian_distance(a + 0.5, b) > 20
    with pytest.raises(ValueError, match="single point"):
        gaussian_distance(a, torch.ones(4, 8))


def test_neighbourhoods_by_hand() -> None:
    reference = double([0, 1, 2, 10]).reshape(4, 1)
    images = double([0.5, 1.5, 30, 31]).reshape(4, 1)
    # k = 1: the reference's balls have radii 1, 1, 1, 8, the images' 1, 1, 1, 1.
    found = neighbourhoods(images, reference, k=1)
    assert found.precision == 0.5  # 30 and 31 are in no ball
    # 0.5 lies in those of 0 and 1, 1.5 in those of 1 and 2; 10's ends at 2.
    assert found.density == (2 + 2) / 4
    assert found.coverage == 0.75
    assert found.recall == 0.75  # 0, 1 and 2 are within 1 of an image; 10 is not


def test_neighbourhoods_of_one_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 800, 6, generator=generator, dtype=torch.float64)
    same = neighbourhoods(a, b)
    # 1 - 2^-k is what coverage tends to for equal distributions (arXiv 2002.09797, lemma 2).
    assert same.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    assert same.density == pytest.approx(1, abs=0.06)
    collapsed = neighbourhoods(a[:1] + 0.01 * a, b)
    assert collapsed.recall < 0.02 < 0.9 < same.recall
    assert neighbourhoods(a + 100, b).precision == 0
    with pytest.raises(ValueError, match="need more than 5 images"):
        neighbourhoods(a[:5], b)


def test_vendi_score_counts_distinct_images() -> None:
    axes = torch.eye(6)[:4]
    assert vendi_score(axes) == pytest.approx(4)
    assert vendi_score(axes.repeat(5, 1)) == pytest.approx(4)
    assert vendi_score(torch.ones(7, 3)) == pytest.approx(1)
    # Three of one kind and one of another: exp(entropy(3/4, 1/4)).
    uneven = torch.eye(2)[[0, 0, 0, 1]]
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert vendi_score(3 * uneven) == pytest.approx(expected)
    features = torch.randn(5, 20, dtype=torch.float64)
    spun = features @ rotation(20, seed=1)
    assert vendi_score(spun) == pytest.approx(vendi_score(features), rel=1e-10)
    with pytest.raises(ValueError, match="row of zeros"):
        vendi_score(torch.zeros(3, 2))


def test_paired_distance_by_hand() -> None:
    a, b = torch.zeros(2, 4), torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, 0]])
    assert paired_distance(a, b).tolist() == [2.5, 0]
    with pytest.raises(ValueError, match="as many images"):
        paired_distance(a, b[:1].repeat(3, 1))


def test_diversity_by_hand() -> None:
    features = torch.tensor([[0.0, 0], [10, 10], [3, 4], [0, 0], [6, 8], [100, 100]])
    groups = torch.tensor([7, 2, 7, 2, 7, 9])
    # Group 7: 5, 10, 5; group 2: 10 sqrt 2; group 9 has one member and does not count.
    expected = (20 / 3 + 10 * math.sqrt(2)) / 2
    assert pairwise_diversity(features, groups) == pytest.approx(expected, rel=1e-12)


def test_diversity_of_copies_is_zero() -> None:
    features = torch.randn(6, 4).repeat(2, 1)
    assert pairwise_diversity(features, torch.arange(6).repeat(2)) == 0


@pytest.mark.parametrize(
    ("student", "closed"), [(1.0, 1.0), (5.0, 0.0), (2.0, 0.75), (9.0, -1.0), (0.0, 1.25)]
)
def test_gap_closed(student: float, closed: float) -> None:
    assert gap_closed(student, naive=5.0, floor=1.0) == pytest.approx(closed)


@pytest.mark.parametrize("naive", [1.0, 0.5, math.nan])
def test_no_gap_to_close(naive: float) -> None:
    with pytest.raises(ValueError, match="no gap to close"):
        gap_closed(0.7, naive=naive, floor=1.0)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(4), torch.zeros(4, 2), r"a must have shape \(N, D\); got \(4,\)"),
        (torch.zeros(4, 2), torch.zeros(4, 2, 1), r"b must have shape \(N, D\)"),
        (torch.zeros(4, 2), torch.zeros(4, 3), "a has 2 features per image and b has 3"),
        (torch.zeros(1, 2), torch.zeros(4, 2), "a must hold at least two images"),
        (torch.zeros(4, 2), torch.full((4, 2), math.inf), "b holds values that are not finite"),
    ],
)
def test_sets_that_do_not_fit(
    distance: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distance(a, b)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"int64 of shape \(4,\)"),
        (torch.zeros(4), "got torch.float32"),
        (torch.arange(4), "at least two images"),
    ],
)
def test_groups_that_do_not_fit(groups: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairwise_diversity(torch.zeros(4, 2), groups)
