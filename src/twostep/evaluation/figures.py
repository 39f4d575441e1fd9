"""Figures of a set of images against the teacher's, with intervals from random halves.

A figure's interval is 1.96 standard deviations of the same figure over random halves of the
prompts (delete-half jackknife; Shao and Wu 1989). Unlike the bootstrap's, a half holds no image
twice, which distances between nearest neighbours and unbiased kernel distances do not survive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
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

_NEIGHBOURS = 5


@dataclass(frozen=True)
class Measured:
    """What was measured in a set of images, a row per image.

    Attributes:
        features: (N, D).
        scores: (N,) each, NaN where a score does not apply.
    """

    features: Tensor
    scores: Mapping[str, Tensor]

    def take(self, rows: Tensor) -> Measured:
        return Measured(self.features[rows], {k: v[rows] for k, v in self.scores.items()})


@dataclass(frozen=True, kw_only=True)
class AlignedSets:
    """All sets of a comparison, rows aligned by prompt and seed.

    Attributes:
        groups: (N,) which images share a prompt.
        reference: the teacher's second set, from other noise.
        teacher: the teacher's images from the common noise.
        sets: every entry by key, the teacher and `naive` among them, and students' previews.
        naive: key of the teacher's weights at the student's number of steps; None without.
        floor: key of the teacher in `sets`.
    """

    groups: Tensor
    reference: Measured
    teacher: Measured
    sets: Mapping[str, Measured]
    floor: str
    naive: str | None

    def take(self, rows: Tensor) -> AlignedSets:
        return replace(
            self,
            groups=self.groups[rows],
            reference=self.reference.take(rows),
            teacher=self.teacher.take(rows),
            sets={key: measured.take(rows) for key, measured in self.sets.items()},
        )


def figures(aligned: AlignedSets) -> dict[str, dict[str, float]]:
    """Flat figures per set.

    `frechet_to_teacher`, `kernel_to_teacher` and `gaussian_to_teacher` (distances to the
    reference), `precision`, `recall`, `density`, `coverage`, `diversity` and `vendi` (relative to
    the teacher's), `paired_distance` (to the teacher's image of the same noise), means of the
    scores, and `gap_closed` where there is a gap.
    """
    reference, teacher = aligned.reference.features, aligned.teacher.features
    several = bool((aligned.groups.bincount() > 1).any())  # images of a prompt
    spread = pairwise_diversity(teacher, aligned.groups) if several else math.nan
    variety = vendi_score(teacher)
    result: dict[str, dict[str, float]] = {}
    for key, measured in aligned.sets.items():
        features = measured.features
        values = {
            "frechet_to_teacher": frechet_distance(features, reference),
            "kernel_to_teacher": kernel_distance(features, reference, aligned.groups),
            "gaussian_to_teacher": gaussian_distance(features, reference, aligned.groups),
            "vendi": vendi_score(features) / variety,
            "paired_distance": paired_distance(features, teacher).mean().item(),
        }
        if several:
            values["diversity"] = pairwise_diversity(features, aligned.groups) / spread
        if len(features) > _NEIGHBOURS:
            values |= asdict(neighbourhoods(features, reference, _NEIGHBOURS))
        values |= {name: score.nanmean().item() for name, score in measured.scores.items()}
        result[key] = values
    if aligned.naive is not None:
        floor = result[aligned.floor]["frechet_to_teacher"]
        naive = result[aligned.naive]["frechet_to_teacher"]
        for key, values in result.items():
            if naive > floor and key not in (aligned.floor, aligned.naive):
                values["gap_closed"] = gap_closed(values["frechet_to_teacher"], naive, floor)
    return result


def intervals(aligned: AlignedSets, halves: int, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Half-widths of 95% intervals, for every figure of `figures(aligned)`.

    Args:
        halves: random halves of the prompts; 0 for none.
    """
    collected: dict[str, dict[str, list[float]]] = {}
    for rows in _halves(aligned.groups, halves, seed):
        for key, values in figures(aligned.take(rows)).items():
            for name, value in values.items():
                collected.setdefault(key, {}).setdefault(name, []).append(value)
    return {
        key: {
            name: 1.96 * float(np.std(numbers, ddof=1))
            for name, numbers in values.items()
            if len(numbers) > 1 and all(math.isfinite(n) for n in numbers)
        }
        for key, values in collected.items()
    }


def _halves(groups: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Rows of a random half of the groups, `count` times."""
    names = groups.unique()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count if len(names) >= 4 else 0):
        chosen = names[torch.randperm(len(names), generator=generator)[: len(names) // 2]]
        yield torch.nonzero(torch.isin(groups, chosen))[:, 0]


def nested(flat: Mapping[str, float]) -> dict[str, Any]:
    """`{"accuracy.overall": 1}` as `{"accuracy": {"overall": 1}}`; NaN left out."""
    result: dict[str, Any] = {}
    for name, value in flat.items():
        if math.isnan(value):
            continue
        section, _, leaf = name.rpartition(".")
        (result.setdefault(section, {}) if section else result)[leaf] = value
    return result
