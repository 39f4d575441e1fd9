"""A full-parameter student as two LoRA files on its teacher, by truncated SVD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twostep.cards.card import lora_card, write_card
from twostep.cards.origin import Origin
from twostep.errors import ExportError
from twostep.evaluation.metrics import peak_signal_to_noise
from twostep.exports.low_rank import low_rank_difference, rank_for
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import Change, joined, rank_of, read_changes, save_lora
from twostep.models.student import PARTS, STEPS, write_lora_index
from twostep.models.transformer import stored_dtype


def export_lora(
    student: ModelFolder,
    teacher: ModelFolder,
    out: Path,
    *,
    rank: int,
    energy: float | None = None,
    check: Sequence[str] = (),
    size: tuple[int, int] = (64, 64),
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Writes two LoRA files, their index and a card; what they keep and lose, a line each.

    The student's own LoRA files (`ModelFolder.loras`) join them whole, beside the student's ranks.

    Args: as `ExportOptions`.

    Raises:
        ExportError: for a student that is no LoRA on this teacher, or whose steps need code.
    """
    schedule = student.schedule()
    if schedule.transition != "euler":
        raise ExportError("to: LoRA files have no code of their own; only euler transitions work")
    plain = replace(student, loras=())
    base = teacher.stored_transformer(PARTS[0])
    dtype = dtype or stored_dtype(student.base / PARTS[0])
    lines = []
    try:
        if energy is not None:
            ranks = (rank_for(base, plain.stored_transformer(part), energy) for part in PARTS)
            rank = max(ranks)
        for name, part in zip(STEPS, PARTS, strict=True):
            found = low_rank_difference(base, plain.stored_transformer(part), rank)
            weights = _with_loras(found.changes, student, dtype)
            path = save_lora(weights, rank_of(weights), out, f"{name}.safetensors")
            lines.append(
                f"{path.name}: rank {rank} keeps {100 * found.energy:.1f}% of the linear layers' "
                f"change; {100 * found.rest:.2f}% as much lies in other parameters and is lost"
            )
    except ValueError as error:
        raise ExportError(str(error)) from error
    write_lora_index(out, teacher=teacher.public_name(), schedule=schedule, sizes=student.sizes)
    if check:
        lines.append(_difference_in_pictures(student, ModelFolder.open(out), check, size))
    _write_card(out, teacher, student, rank=rank_of(weights), lines=lines)
    return lines


def copy_pair(
    student: ModelFolder, teacher: ModelFolder, out: Path, *, dtype: torch.dtype | None = None
) -> list[str]:
    """Copies a student that is two LoRA files already, with a card.

    With LoRA files of its own (`ModelFolder.loras`) each file holds both, exactly.

    Args:
        dtype: of the files; None: as they are.

    Raises:
        ExportError: if it belongs to another model, or its steps need code.
    """
    if student.base != teacher.base:
        raise ExportError(f"teacher: {student.name} belongs to {student.base}, not {teacher.name}")
    if student.schedule().transition != "euler":
        raise ExportError("to: LoRA files have no code of their own; only euler transitions work")
    out.mkdir(parents=True, exist_ok=True)
    for step, part in zip(STEPS, PARTS, strict=True):
        weights = step_weights(student, part, dtype)
        save_lora(weights, rank_of(weights), out, f"{step}.safetensors")
    write_lora_index(
        out, teacher=teacher.public_name(), schedule=student.schedule(), sizes=student.sizes
    )
    rank = rank_of(weights)
    lines = [f"rank {rank}, the adapters as they were trained: nothing is lost"]
    _write_card(out, teacher, student, rank=rank, lines=lines)
    return lines


def step_weights(
    student: ModelFolder, part: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """One step's matrices of a student of two LoRA files, its other LoRA files beside them.

    Args:
        dtype: None: as they are stored.
    """
    file = student.step_file(part)
    changes = read_changes(file, student.family, student.base)
    return _with_loras(changes, student, dtype or _stored(file.path))


def _stored(path: Path) -> torch.dtype:
    with safe_open(path, "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def _with_loras(
    changes: Mapping[str, Change], student: ModelFolder, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A step's own change, with the student's LoRA files beside it."""
    others = [read_changes(file, student.family, student.base) for file in student.loras]
    return joined([changes, *others], dtype=dtype)


def _write_card(
    out: Path, teacher: ModelFolder, student: ModelFolder, *, rank: int, lines: Sequence[str]
) -> None:
    origin = Origin.of(student.path, teacher=teacher.name, base=teacher.base)
    size = student.sizes[0]
    card = lora_card(out.name, student.schedule(), origin, rank=rank, size=size, lines=lines)
    write_card(out, card, origin)


def _difference_in_pictures(
    student: ModelFolder, other: ModelFolder, prompts: Sequence[str], size: tuple[int, int]
) -> str:
    """How far `other`'s pictures are from the student's, prompt by prompt at equal noise."""
    images = []
    for model in (student, other):
        sampler = Sampler.load(model)
        noise = seeded_noise(list(range(len(prompts))), sampler.noise_shape(*size))
        images.append(sampler.generate(prompts, noise))
    ratio = peak_signal_to_noise(images[0], images[1])
    return (
        f"{len(prompts)} pictures at {size[1]}x{size[0]} against the full student's, equal noise: "
        f"peak signal-to-noise ratio {ratio.mean():.1f} dB, lowest {ratio.min():.1f} dB"
    )
