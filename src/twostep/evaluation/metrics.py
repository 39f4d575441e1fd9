"""Distances between sets of images, on features (N images, D features).

Every function works in fp64 and knows nothing of where features come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    # With A'A and B'B the covariances, tr sqrt(A'A B'B) is the sum of A B''s singular values: as
    # small a matrix as images or features allow, and nothing turns complex.
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    shared = torch.linalg.svdvals(root_a @ root_b.T).sum()
    trace = root_a.square().sum() + root_b.square().sum() - 2 * shared
    return max(0.0, ((a.mean(0) - b.mean(0)).square().sum() + trace).item())


def kernel_distance(a: Tensor, b: Tensor, groups: Tensor | None = None) -> float:
    """Kernel distance of two sets: unbiased squared MMD, kernel (x.y / D + 1)^3 (arXiv 1801.01401).

    Args:
        a: (N, D); b: (M, D). Order does not matter.
        groups: int64 (N,), for sets of equal size whose rows answer the same prompts: pairs of one
            group are left out of every mean. Otherwise `a` and `b` share more prompts with each
            other than within themselves, and the distance of equal models is below zero.

    Returns:
        0 on average when both sets come from one distribution, so now and then slightly below.

    Raises:
        ValueError: not two finite sets of two or more images with as many features each, or
            groups that do not fit.
    """
    a, b = _two_sets(a, b)
    return _squared_mmd(a, b, groups, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3)


def gaussian_distance(a: Tensor, b: Tensor, groups: Tensor | None = None) -> float:
    """Unbiased squared MMD with a Gaussian kernel, times 1000 (as CMMD, arXiv 2401.09603, eq. 4).

    The kernel's width is the median distance between members of `b`, so that the figure depends
    on the reference and not on the features' scale.

    Args:
        a: (N, D).
        b: (M, D), the reference.
        groups: as in `kernel_distance`.

    Returns:
        0 on average when both sets come from one distribution.

    Raises:
        ValueError: as `kernel_distance`, or all of `b` is one point.
    """
    a, b = _two_sets(a, b)
    width = torch.pdist(b).median().square()
    if not width > 0:
        raise ValueError("b is a single point, repeated: its kernel has no width")
    kernel = _squared_mmd(
        a, b, groups, lambda x, y: (-torch.cdist(x, y).square() / (2 * width)).exp()
    )
    return 1000 * kernel


@dataclass(frozen=True)
class Neighbourhoods:
    """How two sets overlap, by balls around each image that reach its k-th nearest neighbour.

    Attributes:
        precision: share of images inside some ball of the reference (arXiv 1904.06991).
        recall: share of the reference inside some ball of the images.
        density: reference balls that hold an image, over k, averaged (arXiv 2002.09797); may
            exceed 1.
        coverage: share of the reference's balls that hold an image.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(images: Tensor, reference: Tensor, k: int = 5) -> Neighbourhoods:
    """Precision, recall, density and coverage of `images` (N, D) against `reference` (M, D).

    Raises:
        ValueError: sets that do not fit, or no more than `k` images in one.
    """
    images, reference = _two_sets(images, reference)
    if min(len(images), len(reference)) <= k:
        raise ValueError(
            f"neighbourhoods of {k} need more than {k} images, got {len(images)} and "
            f"{len(reference)}"
        )
    apart = torch.cdist(reference, images)
    reference_radius, image_radius = _radius(reference, k), _radius(images, k)
    in_reference = apart < reference_radius[:, None]
    return Neighbourhoods(
        precision=in_reference.any(0).double().mean().item(),
        recall=(apart < image_radius[None]).any(1).double().mean().item(),
        density=in_reference.double().sum(0).mean().item() / k,
        coverage=in_reference.any(1).double().mean().item(),
    )


def vendi_score(features: Tensor) -> float:
    """Effective number of distinct images: exp of the entropy of the cosine kernel's eigenvalues.

    arXiv 2210.02410, eq. 1 and 2.

    Args:
        features: (N, D), no row all zeros.

    Returns:
        1 when all point one way, N when all are orthogonal.

    Raises:
        ValueError: not a finite set of two or more images, or a row of zeros.
    """
    features = _one_set(features, "features")
    norms = features.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise ValueError("features holds a row of zeros, which has no direction")
    unit = features / norms
    # The smaller of the two Gram matrices has the same eigenvalues, zeros aside.
    gram = unit.T @ unit if unit.shape[1] < len(unit) else unit @ unit.T
    weights = _eigenvalues(gram) / len(unit)
    weights = weights[weights > 0]
    return (-(weights * weights.log()).sum()).exp().item()


def paired_distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance (N,) between images of one row, over the root of D.

    Args:
        a, b: (N, D), row i of both from the same prompt and noise.

    Raises:
        ValueError: shapes differ, or values are not finite.
    """
    a, b = _two_sets(a, b)
    if len(a) != len(b):
        raise ValueError(f"pairs need as many images in both sets, got {len(a)} and {len(b)}")
    return (a - b).norm(dim=1) / math.sqrt(a.shape[1])


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


def _radius(features: Tensor, k: int) -> Tensor:
    """Distance of each image to its k-th nearest neighbour in its own set."""
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values


def _covariance_root(features: Tensor) -> Tensor:
    """(K, D) whose product with itself is the unbiased covariance, K the smaller of N and D."""
    centred = (features - features.mean(0)) / math.sqrt(len(features) - 1)
    return torch.linalg.qr(centred, mode="r").R if len(features) > features.shape[1] else centred


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Of a symmetric positive semidefinite matrix, ascending; rounding noise set to 0."""
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    bound = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return torch.where(values > bound, values, 0.0)


def _squared_mmd(
    a: Tensor, b: Tensor, groups: Tensor | None, kernel: Callable[[Tensor, Tensor], Tensor]
) -> float:
    across = torch.ones(len(a), len(b), dtype=torch.bool, device=a.device)
    within_a = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    within_b = ~torch.eye(len(b), dtype=torch.bool, device=a.device)
    if groups is not None:
        if groups.shape != (len(a),) or len(a) != len(b):
            raise ValueError(
                f"groups must have one entry per image of both sets, got {tuple(groups.shape)} "
                f"for {len(a)} and {len(b)} images"
            )
        groups = groups.to(a.device)
        across = within_a = within_b = groups[:, None] != groups[None]
        if not bool(across.any()):
            raise ValueError("groups: all images are of one group, so that no pair is left")
    within = kernel(a, a)[within_a].mean() + kernel(b, b)[within_b].mean()
    return (within - 2 * kernel(a, b)[across].mean()).item()


def peak_signal_to_noise(a: Tensor, b: Tensor) -> Tensor:
    """Decibels (N,) between images (N, C, H, W) in -1..1, each with its own; 100 at most."""
    error = (a - b).square().mean(dim=(1, 2, 3))
    # The range is 2, its square 4.
    return 10 * torch.log10(4 / error.clamp_min(4e-10))
