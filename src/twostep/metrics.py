"""Distances between sets of images, on features (N images, D features).

Every function works in fp64 and knows nothing of where features come from.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians fitted to two sets (arXiv 1706.08500).

    Covariances are the unbiased ones; they may be singular, as when N < D.

    Args:
        a: (N, D); b: (M, D). Order does not matter.

    Returns:
        At least 0; 0 when means and covariances agree.

    Raises:
        ValueError: not two finite sets of two or more images with as many features each.
    """
    a, b = _two_sets(a, b)
    covariance_a, covariance_b = _covariance(a), _covariance(b)
    # tr sqrt(Ca Cb) by a symmetric matrix with the same eigenvalues: nothing turns complex.
    root = _root(covariance_a)
    eigenvalues = _eigenvalues(root @ covariance_b @ root)
    trace = covariance_a.trace() + covariance_b.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, ((a.mean(0) - b.mean(0)).square().sum() + trace).item())


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Kernel distance of two sets: unbiased squared MMD, kernel (x.y / D + 1)^3 (arXiv 1801.01401).

    Args:
        a: (N, D); b: (M, D). Order does not matter.

    Returns:
        0 on average when both sets come from one distribution, so now and then slightly below.

    Raises:
        ValueError: not two finite sets of two or more images with as many features each.
    """
    a, b = _two_sets(a, b)
    within = _mean_off_diagonal(_cubic(a, a)) + _mean_off_diagonal(_cubic(b, b))
    return (within - 2 * _cubic(a, b).mean()).item()


def pairwise_diversity(features: Tensor, groups: Tensor) -> float:
    """Mean Euclidean distance between images of one group, averaged over groups of two or more.

    Args:
        features: (N, D).
        groups: int64 (N,), which images belong together, such as those of one prompt.

    Raises:
        ValueError: shapes or types do not fit, or no group has two members.
    """
    features = _one_set(features, "features")
    if groups.shape != (len(features),) or groups.dtype != torch.int64:
        raise ValueError(
            f"groups must be int64 of shape ({len(features)},), one per image; "
            f"got {groups.dtype} of shape {tuple(groups.shape)}"
        )
    groups = groups.to(features.device)
    members = [features[groups == group] for group in groups.unique()]
    distances = [torch.pdist(images).mean() for images in members if len(images) > 1]
    if not distances:
        raise ValueError("diversity needs a group with at least two images; every group has one")
    return torch.stack(distances).mean().item()


def gap_closed(student: float, naive: float, floor: float) -> float:
    """Share of the way from `naive` down to `floor`: 1 - (student - floor) / (naive - floor).

    Args:
        student: its distance to the reference.
        naive: the distance of the teacher's weights at the student's number of steps.
        floor: the distance of the teacher itself, with other noise.

    Returns:
        1 at the floor, 0 at the naive distance, negative beyond it.

    Raises:
        ValueError: `naive` is not above `floor`, so there is no gap to close.
    """
    if not naive > floor:
        raise ValueError(
            f"there is no gap to close: the naive distance ({naive:g}) must be above "
            f"the floor ({floor:g})"
        )
    return 1 - (student - floor) / (naive - floor)


def _one_set(features: Tensor, name: str) -> Tensor:
    """fp64 (N, D), checked."""
    if features.ndim != 2:
        raise ValueError(f"{name} must have shape (N, D); got {tuple(features.shape)}")
    if len(features) < 2 or not features.shape[1]:
        raise ValueError(
            f"{name} must hold at least two images of at least one feature; "
            f"got shape {tuple(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite")
    return features.detach().double()


def _two_sets(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _one_set(a, "a"), _one_set(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} features per image and b has {b.shape[1]}")
    return a, b


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Of a symmetric positive semidefinite matrix, ascending; rounding noise set to 0."""
    return _without_noise(torch.linalg.eigvalsh((matrix + matrix.T) / 2))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * _without_noise(values).sqrt()) @ vectors.T


def _without_noise(eigenvalues: Tensor) -> Tensor:
    # A null direction's noise of 1e-16 would have a root of 1e-8: far above rounding.
    bound = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().max()
    return torch.where(eigenvalues > bound, eigenvalues, 0.0)


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    count = len(kernel)
    return (kernel.sum() - kernel.trace()) / (count * (count - 1))
