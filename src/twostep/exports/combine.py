"""Students made of others: `twostep assemble` of parts, `twostep average` of whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from twostep.errors import ExportError, ModelError
from twostep.models.folder import ModelFolder
from twostep.models.foreign import check_finite, check_folder, check_header
from twostep.models.lora_files import LoraFile
from twostep.models.student import PARTS, STEPS, check_free, write_student
from twostep.models.transformer import stored_transformer, transformer_with


def assemble(teacher: str, first: str, second: str, *, out: Path) -> None:
    """Makes a student of two transformers that came from elsewhere.

    Args:
        teacher: gives everything but the transformers, and the schedule: two steps of its own.
        first, second: diffusers folders of a transformer or of a whole pipeline (of a student the
            step's own), whole transformers in one .safetensors file (diffusers' layout or
            ComfyUI's), or LoRA files on the teacher, in any layout that `teacher.loras` takes.

    Raises:
        ModelError: for a part that is not there or does not fit.
    """
    folder = ModelFolder.open(teacher)
    folder.check_teacher("teacher")
    check_free(out)
    names = zip((first, second), PARTS, STEPS, strict=True)
    steps = (_fitting(folder, name, part, f"--{step}") for name, part, step in names)
    write_student(
        folder.base, steps, schedule=folder.schedule(), folder=out, dtype=None, sizes=folder.sizes
    )


def _fitting(teacher: ModelFolder, name: str, part: str, option: str) -> Any:
    model = _part(teacher, name, part, option)
    found, wanted = model.config.dim, teacher.architecture["dim"]
    if found != wanted:
        raise ExportError(f"{option}: {name} is {found} wide, {teacher.name} {wanted}")
    return model


def _part(teacher: ModelFolder, name: str, part: str, option: str) -> Any:
    """One step's transformer; `part` is taken of a student's folder."""
    path, class_name = Path(name), teacher.family.transformer
    if path.suffix == ".safetensors" and path.is_file():
        check_header(path)
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
        if any("lora" in key.lower() or "lokr" in key for key in keys):
            tuned = teacher.with_loras([LoraFile.open(path, option=option)])
            return tuned.stored_transformer(PARTS[0])
        return _single_file(teacher, path, option)
    if (path / "config.json").is_file():
        check_folder(path)
        model = stored_transformer(path, None, class_name)
        check_finite(model, path)
        return model
    folder = ModelFolder.open(name)
    return folder.stored_transformer(PARTS[0] if folder.student is None else part)


def _single_file(teacher: ModelFolder, path: Path, option: str) -> Any:
    """A whole transformer in one file, in diffusers' or ComfyUI's layout; every tensor is used.

    Raises:
        ModelError: for tensors that the teacher's transformer lacks, or it has and the file lacks.
    """
    skeleton = teacher.family.without_weights(teacher.base, PARTS[0], torch.float32)
    weights = teacher.family.whole_weights(load_file(path))
    wanted = {key: tuple(value.shape) for key, value in skeleton.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if found != wanted:
        stray = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))[0]
        raise ModelError(
            f"{option}: {path} is no LoRA and no whole transformer like {teacher.name}'s: "
            f"{stray} is {_shape(found.get(stray))} in the file, {_shape(wanted.get(stray))} there"
        )
    types = {value.dtype for value in weights.values()}
    if not types <= {torch.float32, torch.bfloat16, torch.float16}:
        packed = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        raise ModelError(f"{option}: {path} holds {packed}, expected float32, bfloat16 or float16")
    model = transformer_with(skeleton, weights)
    check_finite(model, path)
    return model


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a number"


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
    steps = (_mean(folders, part) for part in PARTS)
    write_student(
        folders[0].base,
        steps,
        schedule=folders[0].schedule(),
        folder=out,
        dtype=None,
        sizes=folders[0].sizes,
    )


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
