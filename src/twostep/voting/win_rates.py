"""Win rates with intervals, and one scale for several models (numpy only)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # of a 95% interval
_ROUNDS, _CLOSE = 10_000, 1e-10


def wilson(wins: float, count: float, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of the share `wins / count` (Wilson 1927).

    Args:
        wins: 0..count; a tie is half a win.

    Returns:
        (low, high); (0, 1) for no votes at all.

    Raises:
        ValueError: if `wins` is not within 0..count.
    """
    if not 0 <= wins <= count:
        raise ValueError(f"wins must be within 0..{count:g}, got {wins:g}")
    if count == 0:
        return 0.0, 1.0
    share, square = wins / count, z * z
    centre = share + square / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    scale = 1 + square / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bradley_terry(
    wins: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Strengths of M models whose odds of winning are the ratio of their strengths' exponentials.

    Bradley and Terry 1952, fitted by Hunter's iteration (2004). To every pair that met, one tie is
    added, so that a model that won every time has a finite strength.

    Args:
        wins: (M, M), how often the row was better than the column; a tie is half for each.

    Returns:
        strengths (M,) in log-odds, their mean 0, and half-widths (M,) of their 95% intervals from
        the observed information; NaN where a model met none of the others.

    Raises:
        ValueError: not square, negative, or models that fall into groups that never met.
    """
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or (wins < 0).any():
        raise ValueError(f"wins must be (M, M) and not negative, got shape {wins.shape}")
    met = (wins + wins.T) > 0
    np.fill_diagonal(met, False)
    if not _connected(met):
        raise ValueError("some models never met, not even through others: no common scale")
    counted = np.where(met, wins + 0.5, 0.0)
    games, won = counted + counted.T, counted.sum(1)
    power = np.ones(len(wins))
    for _ in range(_ROUNDS):
        new = won / (games / (power[:, None] + power[None])).sum(1)
        new /= np.exp(np.log(new).mean())
        moved = np.abs(np.log(new / power)).max()
        power = new
        if moved < _CLOSE:
            break
    chance = power[:, None] / (power[:, None] + power[None])
    weight = games * chance * (1 - chance)
    information = np.diag(weight.sum(1)) - weight
    error = np.sqrt(np.clip(np.diag(np.linalg.pinv(information, hermitian=True)), 0, None))
    return np.log(power), Z * error


def _connected(met: NDArray[np.bool_]) -> bool:
    reached = np.zeros(len(met), dtype=bool)
    reached[:1] = True
    for _ in range(len(met)):
        reached |= met[reached].any(0)
    return bool(reached.all())
