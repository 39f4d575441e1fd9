"""Intervals and tests for rows that share seeds and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

_DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """How much one row is ahead of another.

    Attributes:
        mean: over seeds and prompts.
        low, high: of the 95% interval, over both.
        p: one-sided, that it is not ahead; from the seeds alone.
        seeds, ahead: how many there are, and in how many it is ahead.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    ahead: int


def difference(better: np.ndarray, worse: np.ndarray, groups: np.ndarray) -> Difference:
    """Paired by seed and picture.

    Args:
        better, worse: (seeds, pictures), of the same seeds and pictures.
        groups: (pictures,) which pictures share a scene; they are drawn together.
    """
    apart = better - worse
    names, place = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(place, row, len(names)) for row in apart])
    sizes = np.bincount(place, minlength=len(names))
    means = apart.mean(1)
    low, high = _bootstrap(sums, sizes)
    return Difference(
        mean=float(means.mean()),
        low=low,
        high=high,
        p=sign_flip(means),
        seeds=len(means),
        ahead=int((means > 0).sum()),
    )


def _bootstrap(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """95% of means over seeds and scenes that are both drawn again, 10,000 times.

    A bootstrap of few seeds is too narrow by sqrt((n - 1) / n) (Davison and Hinkley 1997, 2.3), so
    deviations are widened by its inverse.
    """
    seeds, scenes = sums.shape
    centre = sums.sum() / (seeds * sizes.sum())
    generator = np.random.default_rng(0)
    drawn = np.empty(_DRAWS)
    for i in range(_DRAWS):
        rows = np.bincount(generator.integers(seeds, size=seeds), minlength=seeds)
        columns = np.bincount(generator.integers(scenes, size=scenes), minlength=scenes)
        drawn[i] = rows @ sums @ columns / (seeds * (sizes @ columns))
    widened = centre + (drawn - centre) * np.sqrt(seeds / max(seeds - 1, 1))
    low, high = np.quantile(widened, [0.025, 0.975])
    return float(low), float(high)


def sign_flip(means: Sequence[float] | np.ndarray) -> float:
    """One-sided p that a mean above 0 is chance: the share of all sign patterns as high."""
    values = np.asarray(means, float)
    patterns = np.array(list(product((1.0, -1.0), repeat=len(values))))
    return float(((patterns @ values) >= values.sum() - 1e-12).mean())


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted for their number (Holm 1979), in the order given."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted.tolist()
