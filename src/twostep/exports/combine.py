"""Students made of others: `twostep assemble` of parts, `twostep average` of whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from twostep.errors import ExportError
from twostep.models.folder import ModelFolder
from twostep.models.foreign import check_finite, check_folder
from twostep.models.student import PARTS, check_free, save_student
from twostep.models.transformer import stored_transformer, stored_with_lora, transformer_with


def assemble(teacher: str, first: str, second: str, *, out: Path) -> None:
    """Makes a student of two transformers that came from elsewhere.

    Args:
        teacher: gives everything but the transformers, and the schedule: two steps of its own.
        first, second: diffusers folders of a transformer or of a whole pipeline, or LoRA files
            (.safetensors) on the teacher.

    Raises:
        ModelError: for a part that is not there or does not fit.
    """
    folder = ModelFolder.open(teacher)
    folder.check_teacher("teacher")
    check_free(out)
    parts = [_part(folder, name, part) for name, part in zip((first, second), PARTS, strict=True)]
    if parts[0].config.dim != parts[1].config.dim:
        raise ExportError(f"{first} and {second} have different widths")
    save_student(
        folder.base, *parts,
        schedule=folder.schedule(), folder=out, dtype=parts[0].dtype, sizes=folder.sizes,
    )  # fmt: skip


def _part(teacher: ModelFolder, name: str, part: str) -> Any:
    """A transformer for the step that `part` names; of a student that step's own."""
    path = Path(name)
    if path.suffix == ".safetensors" and path.is_file():
        return stored_with_lora(teacher.base, "transformer", teacher.family.transformer, path)
    if (path / "config.json").is_file():
        check_folder(path)
        model = stored_transformer(path, None, teacher.family.transformer)
        check_finite(model, path)
        return model
    whole = ModelFolder.open(name)
    return whole.stored_transformer(part if whole.student is not None else PARTS[0])


def average(students: Sequence[str], *, out: Path) -> None:
    """Writes the mean of `students` to the folder `out` (model soups, arXiv 2203.05482).

    For students of one teacher that began at the same weights: runs that differ in seed or settings
    err in different ways, and their mean often errs less than each. Everything but the transformers
    is the first one's.

    Raises:
        ModelError: if there are fewer than two, one is no student, or two do not fit together.
    """
    if len(students) < 2:
        raise ExportError(f"students: a mean needs two at least, got {len(students)}")
    folders = [ModelFolder.open(student) for student in students]
    for folder in folders:
        folder.check_student("students")
    kinds = [_kind(folder) for folder in folders]
    for folder, kind in zip(folders, kinds, strict=True):
        for name, value in kind.items():
            if value != kinds[0][name]:
                raise ExportError(f"{folder.name} and {folders[0].name} differ in their {name}")
    check_free(out)
    first, second = (_mean(folders, part) for part in PARTS)
    schedule = folders[0].schedule()
    save_student(
        folders[0].base, first, second,
        schedule=schedule, folder=out, dtype=first.dtype, sizes=folders[0].sizes,
    )  # fmt: skip


def _kind(folder: ModelFolder) -> dict[str, Any]:
    """What students must have in common."""
    return {"architecture": folder.architecture, "schedule": folder.schedule()}


def _mean(folders: Sequence[ModelFolder], part: str) -> Any:
    """One step's transformer, in the first one's dtype; the sum is fp32, one folder at a time."""
    like = folders[0].stored_transformer(part)
    total = {key: value.float() for key, value in like.state_dict().items()}
    for folder in folders[1:]:
        for key, value in folder.stored_transformer(part).state_dict().items():
            total[key] += value
    mean = {k: torch.div(v, len(folders)).to(like.dtype) for k, v in total.items()}
    return transformer_with(like, mean)
