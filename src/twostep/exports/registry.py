"""`twostep export`: a student in the formats that others read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from twostep.cards.card import student_card, write_card
from twostep.cards.origin import Origin, is_hub_id
from twostep.errors import ExportError
from twostep.exports.comfyui import export_comfyui
from twostep.exports.gguf_file import QUANTISATIONS, Quantisation, check_gguf, export_gguf
from twostep.exports.lora import copy_pair, export_lora
from twostep.exports.packed import PACKINGS, Packing
from twostep.exports.release import check_public
from twostep.exports.torch_program import export_programs
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import LoraFile
from twostep.models.student import PARTS, check_free, write_student
from twostep.models.transformer import stored_dtype
from twostep.runtime.checksums import verify, write_checksums
from twostep.runtime.files import new_folder


@dataclass(frozen=True)
class ExportOptions:
    """What formats may be asked for; each reads its own.

    Attributes:
        teacher: for `lora`, the model that the LoRA files belong to.
        rank: for `lora`.
        energy: for `lora`, the share of the linear layers' change to keep, in place of `rank`.
        check: for `lora`, prompts on which the files' pictures are compared with the student's.
        base_model: the teacher's id on the hub, for cards and LoRA files, where it was not opened
            by it.
        size: (height, width) in pixels, of those pictures and of a `torch` program's; None: the
            student's own.
        batch_size, caption_tokens: what a `torch` program takes.
        dtype: of the weights that are written; None: as they are stored.
        loras: LoRA files that become part of both steps.
        weights: the blocks' matrices, for `comfyui` fp8 or int8, for `gguf` q8_0 (None) or q4_k.
        merged: for `comfyui`, whole transformers of two LoRA files, too.
    """

    teacher: str | None = None
    rank: int = 64
    energy: float | None = None
    check: Sequence[str] = ()
    base_model: str | None = None
    size: tuple[int, int] | None = None
    batch_size: int = 1
    caption_tokens: int = 64
    dtype: torch.dtype | None = None
    loras: Sequence[LoraFile] = ()
    weights: str | None = None
    merged: bool = False


# (student, folder to write, options) -> what the user should know, a line each
Exporter = Callable[[ModelFolder, Path, ExportOptions], list[str]]


def export(student: str, target: str, out: Path, options: ExportOptions | None = None) -> list[str]:
    """Writes `student` to the folder `out`.

    Args:
        target: one of `FORMATS`.

    Returns:
        What the user should know, a line each.

    Raises:
        ModelError, InputError: for what cannot be exported, before anything is written.
    """
    if target not in FORMATS:
        raise ExportError(f"to: {target!r} is unknown; allowed: {', '.join(FORMATS)}")
    options = options or ExportOptions()
    if options.base_model is not None and not is_hub_id(options.base_model):
        raise ExportError(
            f"base_model: expected a model of the hub, OWNER/NAME, got {options.base_model!r}"
        )
    folder = ModelFolder.open(student)
    folder.check_student("model")
    check_free(out)
    options = replace(options, size=options.size or folder.sizes[0])
    folder = folder.with_loras(options.loras)
    _check_options(folder, target, options)
    with new_folder(out) as temporary:
        lines = FORMATS[target](folder, temporary, options)
        check_public(temporary, _places(folder, out))
        write_checksums(temporary)
    verify(out)
    return lines


def _places(student: ModelFolder, out: Path) -> list[Path]:
    """Of this machine, which no release may name."""
    here = [student.path, student.base, out.parent, Path.cwd(), Path(__file__).parents[1]]
    with suppress(RuntimeError):  # no home
        here.append(Path.home())
    return [place.resolve() for place in here]


def _check_options(student: ModelFolder, target: str, options: ExportOptions) -> None:
    """What would fail only after the weights are read."""
    allowed = {"comfyui": PACKINGS, "gguf": QUANTISATIONS}.get(target, ())
    if options.weights is not None and options.weights not in allowed:
        known = " or ".join(allowed) or "none: it is for comfyui and gguf"
        raise ExportError(f"weights: for {target} expected {known}, got {options.weights!r}")
    if target == "gguf":
        check_gguf()
    if target not in ("lora", "torch"):
        return
    assert options.size is not None
    student.latent_shape(options.size)
    if target == "torch":
        most = student.family.caption_tokens(student.architecture)
        if options.caption_tokens > most:
            raise ExportError(
                f"caption_tokens: must be at most {most} for this model, "
                f"got {options.caption_tokens}"
            )
        return
    if student.kind == "lora_pair":  # copied as it is
        return
    if options.energy is not None and not 0 < options.energy <= 1:
        raise ExportError(f"energy: must be above 0 and at most 1, got {options.energy}")
    skeleton = student.family.without_weights(student.base, "transformer", torch.float32)
    layers = [m for m in skeleton.modules() if isinstance(m, nn.Linear)]
    most = max(min(layer.in_features, layer.out_features) for layer in layers)
    if options.rank > most:
        raise ExportError(
            f"rank: must be at most {most}, the largest rank that a matrix of this model can have, "
            f"got {options.rank}"
        )


def _diffusers(student: ModelFolder, out: Path, options: ExportOptions) -> list[str]:
    return _folder(student, out, options)


def _server(student: ModelFolder, out: Path, options: ExportOptions) -> list[str]:
    return _folder(student, out, options, server=True)


def _folder(
    student: ModelFolder, out: Path, options: ExportOptions, *, server: bool = False
) -> list[str]:
    schedule = student.schedule()
    steps = (student.stored_transformer(part, options.dtype) for part in PARTS)
    write_student(
        student.base, steps, schedule=schedule, folder=out, dtype=None,
        plain_class=server, sizes=student.sizes,
    )  # fmt: skip
    teacher = options.base_model or student.check_student("model").teacher
    origin = Origin.of(student.path, teacher=teacher, base=student.base)
    card = student_card(out.name, schedule, origin, size=student.sizes[0], server=server)
    write_card(out, card, origin)
    dtype = options.dtype or stored_dtype(student.base / PARTS[0])
    if student.kind != "lora_pair" or dtype == torch.float32:
        return []
    return [
        f"the adapters are added to weights in {str(dtype).removeprefix('torch.')}, which rounds "
        "what they change; --dtype float32 keeps it, and --to lora keeps it exactly"
    ]


def _lora(student: ModelFolder, out: Path, options: ExportOptions) -> list[str]:
    index = student.check_student("model")
    # What has a fingerprint is a folder of this machine, found when the student was opened.
    own = index.teacher if index.teacher_sha256 is None else str(student.base)
    named = options.teacher or own
    if named is None:
        raise ExportError("teacher: LoRA files belong to a model; name it")
    teacher = ModelFolder.open(named)
    teacher.check_teacher("teacher")
    if options.base_model is not None:
        teacher = replace(teacher, name=options.base_model)
    if own is not None:
        return copy_pair(student, teacher, out, dtype=options.dtype)
    assert options.size is not None
    return export_lora(
        student, teacher, out,
        rank=options.rank, energy=options.energy, check=options.check, size=options.size,
        dtype=options.dtype,
    )  # fmt: skip


def _comfyui(student: ModelFolder, out: Path, options: ExportOptions) -> list[str]:
    packing = cast(Packing | None, options.weights)
    return export_comfyui(student, out, dtype=options.dtype, packing=packing, merged=options.merged)


def _gguf(student: ModelFolder, out: Path, options: ExportOptions) -> list[str]:
    return export_gguf(student, out, quantisation=cast(Quantisation, options.weights or "q8_0"))


def _torch(student: ModelFolder, out: Path, options: ExportOptions) -> list[str]:
    assert options.size is not None
    return export_programs(
        student, out,
        size=options.size, batch_size=options.batch_size, caption_tokens=options.caption_tokens,
    )  # fmt: skip


FORMATS: dict[str, Exporter] = {
    "diffusers": _diffusers,
    "server": _server,
    "lora": _lora,
    "comfyui": _comfyui,
    "gguf": _gguf,
    "torch": _torch,
}
