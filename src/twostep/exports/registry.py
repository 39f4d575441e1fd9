"""`twostep export`: a student in the formats that others read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import ZImageTransformer2DModel

from twostep.errors import ExportError
from twostep.evaluation.metrics import peak_signal_to_noise
from twostep.exports.card import lora_card, student_card
from twostep.exports.comfyui import export_comfyui
from twostep.exports.lora import low_rank_difference, rank_for, save_lora
from twostep.exports.torch_program import export_programs
from twostep.inference.pipeline import save_student
from twostep.inference.sampler import Sampler, read_two_step
from twostep.method.flow import sigma_schedule
from twostep.method.rollout import TwoStep, seeded_noise
from twostep.models.folder import (
    read_shift,
    resolve,
)
from twostep.models.lora_pair import STEPS, LoraPair
from twostep.runtime.files import write_atomically

FORMATS = ("diffusers", "lora", "comfyui", "torch")


def export(
    student: str,
    target: str,
    out: Path,
    teacher: str | None = None,
    rank: int = 64,
    energy: float | None = None,
    check: Sequence[str] = (),
    size: tuple[int, int] = (64, 64),
    batch_size: int = 1,
    caption_tokens: int = 64,
) -> list[str]:
    """Writes `student` to the folder `out`.

    Args:
        target: one of `FORMATS`.
        teacher: for `lora`, the model that the LoRA files belong to.
        rank: for `lora`.
        energy: for `lora`, the share of the linear layers' change to keep, in place of `rank`.
        check: for `lora`, prompts on which the files' pictures are compared with the student's.
        size: (height, width) in pixels, of those pictures and of a `torch` program's.
        batch_size, caption_tokens: what a `torch` program takes.

    Returns:
        What the user should know, a line each.

    Raises:
        ModelError: for what cannot be exported, before anything is written.
    """
    if target not in FORMATS:
        raise ExportError(f"to: {target!r} is unknown; allowed: {', '.join(FORMATS)}")
    folder = resolve(student)
    schedule = student_schedule(folder)
    check_free(out)
    if target == "torch":
        return export_programs(student, out, size, batch_size, caption_tokens)
    first, second = load_part(folder, "transformer"), load_part(folder, "transformer_2")
    if target == "comfyui":
        states = (first.state_dict(), second.state_dict())
        return export_comfyui(folder, states, len(first.layers), out)
    facts = _facts(folder)
    if target == "diffusers":
        save_student(folder, first, second, schedule, out, first.dtype)
        _write(out / "README.md", student_card(out.name, schedule, facts))
        return []
    if teacher is None:
        raise ExportError("teacher: LoRA files belong to a model; name it")
    if schedule.transition != "euler":
        raise ExportError("to: LoRA files have no code of their own; only euler transitions work")
    base = load_part(resolve(teacher), "transformer")
    lines = []
    try:
        if energy is not None:
            rank = max(rank_for(base, model, energy) for model in (first, second))
        for name, model in zip(STEPS, (first, second), strict=True):
            found = low_rank_difference(base, model, rank)
            path = save_lora(found, rank, out, f"{name}.safetensors")
            lines.append(
                f"{path.name}: rank {rank} keeps {100 * found.energy:.1f}% of the linear layers' "
                f"change; {100 * found.rest:.2f}% as much lies in other parameters and is lost"
            )
    except ValueError as error:
        raise ExportError(str(error)) from error
    LoraPair(str(Path(teacher).resolve()) if Path(teacher).is_dir() else teacher, schedule).write(
        out
    )
    if check:
        lines.append(_difference_in_pictures(student, str(out), check, size))
    shift = read_shift(folder)
    # The card's script runs without this package, which alone knows the zoo.
    named = str(resolve(teacher)) if teacher.startswith("zoo:") else teacher
    _write(out / "README.md", lora_card(out.name, named, schedule, shift, rank, facts, lines))
    return lines


def _difference_in_pictures(
    student: str, other: str, prompts: Sequence[str], size: tuple[int, int]
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


def student_schedule(folder: Path) -> TwoStep:
    """The schedule of a student's folder; raises ExportError if it is no student's."""
    schedule = read_two_step(folder)
    if schedule is None:
        raise ExportError(f"{folder} is no two-step student: it has no transformer_2")
    return schedule


def check_free(out: Path) -> None:
    """Raises ExportError if the folder `out` has anything in it."""
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"out: {out} is not empty")


def load_part(folder: Path, part: str) -> Any:
    """A transformer of a model folder, in the dtype that it is stored in."""
    return ZImageTransformer2DModel.from_pretrained(folder, subfolder=part, use_safetensors=True)


def _facts(folder: Path) -> Mapping[str, Any]:
    """What a run folder around the student tells about it: recipe and figures, if there."""
    facts: dict[str, Any] = {}
    recipe = folder.parent / "recipe.yaml"
    if recipe.is_file():
        facts["recipe"] = recipe.read_text(encoding="utf-8")
    for path in (folder.parent / "check" / "metrics.json", folder.parent / "report.json"):
        if path.is_file():
            facts["figures"] = json.loads(path.read_text(encoding="utf-8"))
            break
    return facts


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def assemble(teacher: str, first: str, second: str, out: Path) -> None:
    """Makes a student of two transformers that came from elsewhere.

    Args:
        teacher: gives everything but the transformers, and the schedule: two steps of its own.
        first, second: diffusers folders of a `ZImageTransformer2DModel` or of a whole pipeline,
            or LoRA files (.safetensors) on the teacher.

    Raises:
        ModelError: for a part that is not there or does not fit.
    """
    folder = resolve(teacher)
    check_free(out)
    parts = [_part(folder, name) for name in (first, second)]
    if parts[0].config.dim != parts[1].config.dim:
        raise ExportError(f"{first} and {second} have different widths")
    schedule = TwoStep(sigma_schedule(2, read_shift(folder))[1])
    save_student(folder, parts[0], parts[1], schedule, out, parts[0].dtype)


def _part(teacher: Path, name: str) -> Any:
    path = Path(name)
    if path.suffix == ".safetensors" and path.is_file():
        model = load_part(teacher, "transformer")
        model.load_lora_adapter(str(path), prefix="transformer", adapter_name="step")
        model.fuse_lora()
        model.unload_lora()
        return model
    if (path / "config.json").is_file():
        return ZImageTransformer2DModel.from_pretrained(path, use_safetensors=True)
    return load_part(resolve(name), "transformer")
