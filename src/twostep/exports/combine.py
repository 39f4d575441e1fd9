"""`twostep average`: several runs' students as one, by the mean of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from twostep.errors import ExportError
from twostep.exports.registry import (
    check_free,
    load_part,
    student_schedule,
)
from twostep.inference.pipeline import save_student
from twostep.models.folder import (
    read_architecture,
    read_shift,
    resolve,
    transformer_with,
)


def average(students: Sequence[str], out: Path) -> None:
    """Writes the mean of `students` to the folder `out` (model soups, arXiv 2203.05482).

    For students of one teacher that began at the same weights: runs that differ in seed or settings
    err in different ways, and their mean often errs less than each. Everything but the transformers
    is the first one's.

    Raises:
        ModelError: if there are fewer than two, one is no student, or two do not fit together.
    """
    if len(students) < 2:
        raise ExportError(f"students: a mean needs two at least, got {len(students)}")
    folders = [resolve(student) for student in students]
    kinds = [_kind(folder) for folder in folders]
    for folder, kind in zip(folders, kinds, strict=True):
        for name, value in kind.items():
            if value != kinds[0][name]:
                raise ExportError(f"{folder} and {folders[0]} differ in their {name}")
    check_free(out)
    first, second = (_mean(folders, part) for part in ("transformer", "transformer_2"))
    save_student(folders[0], first, second, kinds[0]["schedule"], out, first.dtype)


def _kind(folder: Path) -> dict[str, Any]:
    """What students must have in common."""
    return {
        "architecture": read_architecture(folder),
        "schedule": student_schedule(folder),
        "time shift": read_shift(folder),
    }


def _mean(folders: Sequence[Path], part: str) -> Any:
    """One step's transformer, in the first one's dtype; the sum is fp32, one folder at a time."""
    like = load_part(folders[0], part)
    total = {key: value.float() for key, value in like.state_dict().items()}
    for folder in folders[1:]:
        for key, value in load_part(folder, part).state_dict().items():
            total[key] += value
    mean = {k: torch.div(v, len(folders)).to(like.dtype) for k, v in total.items()}
    return transformer_with(like, mean)
