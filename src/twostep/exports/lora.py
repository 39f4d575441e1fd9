"""A full-parameter student as two LoRA files on its teacher, by truncated SVD."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from twostep.cards.card import lora_card, write_card
from twostep.cards.origin import Origin
from twostep.errors import ExportError
from twostep.evaluation.metrics import peak_signal_to_noise
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import rank_of, save_lora
from twostep.models.student import PARTS, STEPS, write_lora_index


def export_lora(
    student: ModelFolder,
    teacher: ModelFolder,
    out: Path,
    *,
    rank: int,
    energy: float | None = None,
    check: Sequence[str] = (),
    size: tuple[int, int] = (64, 64),
) -> list[str]:
    """Writes two LoRA files, their index and a card; what they keep and lose, a line each.

    Args: as `ExportOptions`.

    Raises:
        ExportError: for a student that is no LoRA on this teacher, or whose steps need code.
    """
    schedule = student.schedule()
    if schedule.transition != "euler":
        raise ExportError("to: LoRA files have no code of their own; only euler transitions work")
    models = [student.stored_transformer(part) for part in PARTS]
    base = teacher.stored_transformer("transformer")
    lines = []
    try:
        if energy is not None:
            rank = max(rank_for(base, model, energy) for model in models)
        for name, model in zip(STEPS, models, strict=True):
            found = low_rank_difference(base, model, rank)
            path = save_lora(found.weights, rank, out, f"{name}.safetensors")
            lines.append(
                f"{path.name}: rank {rank} keeps {100 * found.energy:.1f}% of the linear layers' "
                f"change; {100 * found.rest:.2f}% as much lies in other parameters and is lost"
            )
    except ValueError as error:
        raise ExportError(str(error)) from error
    write_lora_index(out, teacher=teacher.public_name(), schedule=schedule)
    if check:
        lines.append(_difference_in_pictures(student, ModelFolder.open(out), check, size))
    _write_card(out, teacher, student, rank=rank, lines=lines)
    return lines


def copy_pair(student: ModelFolder, teacher: ModelFolder, out: Path) -> list[str]:
    """Copies a student that is two LoRA files already, with a card.

    Raises:
        ExportError: if it belongs to another model, or its steps need code.
    """
    if student.base != teacher.base:
        raise ExportError(f"teacher: {student.name} belongs to {student.base}, not {teacher.name}")
    if student.schedule().transition != "euler":
        raise ExportError("to: LoRA files have no code of their own; only euler transitions work")
    out.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        shutil.copyfile(student.path / f"{step}.safetensors", out / f"{step}.safetensors")
    rank = rank_of(load_file(out / f"{STEPS[0]}.safetensors"))
    write_lora_index(out, teacher=teacher.public_name(), schedule=student.schedule())
    lines = [f"rank {rank}, the adapters as they were trained: nothing is lost"]
    _write_card(out, teacher, student, rank=rank, lines=lines)
    return lines


def _write_card(
    out: Path, teacher: ModelFolder, student: ModelFolder, *, rank: int, lines: Sequence[str]
) -> None:
    origin = Origin.of(student.path, teacher=teacher.name, base=teacher.base)
    size = origin.size_for(student.space)
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


@dataclass(frozen=True)
class LowRank:
    """A low-rank difference between two transformers.

    Attributes:
        weights: `MODULE.lora_A.weight` (rank, in) and `MODULE.lora_B.weight` (out, rank).
        energy: share of the linear layers' squared difference that the rank keeps, 0 to 1.
        rest: squared difference in all other parameters, over that in the linear layers; LoRA
            files cannot carry it.
    """

    weights: dict[str, Tensor]
    energy: float
    rest: float


@torch.no_grad()
def rank_for(teacher: nn.Module, student: nn.Module, energy: float) -> int:
    """The lowest rank that keeps `energy` of the linear layers' squared difference.

    One for all layers, so that alpha == rank holds for all: several readers of LoRA files ignore
    alpha.

    Raises:
        ValueError: if `energy` is not in (0, 1], or the two have different layers.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
    shares: list[float] = []
    for _, change, is_linear in _changes(teacher, student):
        if is_linear:
            values = torch.linalg.svdvals(change).double().square().tolist()
            shares += [0.0] * (len(values) - len(shares))
            for index, value in enumerate(values):
                shares[index] += value
    kept, total = 0.0, sum(shares)
    for rank, share in enumerate(shares, 1):
        kept += share
        if kept >= energy * total * (1 - 1e-9):
            return rank
    return len(shares)


@torch.no_grad()
def low_rank_difference(teacher: nn.Module, student: nn.Module, rank: int) -> LowRank:
    """`student` less `teacher`, each linear layer's weight by its `rank` largest directions.

    Every layer gets the same rank, with zeros where it has fewer.

    Raises:
        ValueError: if `rank` is below 1 or the two have different layers.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    weights: dict[str, Tensor] = {}
    kept = total = rest = 0.0
    for name, change, is_linear in _changes(teacher, student):
        if not is_linear:
            rest += change.square().sum().item()
            continue
        total += change.square().sum().item()
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        count = min(rank, len(s))
        root = s[:count].sqrt()
        down, up = torch.zeros(rank, v.shape[1]), torch.zeros(u.shape[0], rank)
        down[:count], up[:, :count] = root[:, None] * v[:count], u[:, :count] * root
        kept += s[:count].square().sum().item()
        module = name.removesuffix(".weight")
        weights[f"{module}.lora_A.weight"], weights[f"{module}.lora_B.weight"] = down, up
    return LowRank(weights, kept / total if total else 1.0, rest / total if total else 0.0)


def _changes(teacher: nn.Module, student: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Each parameter's name, its change in fp32, and whether it is a linear layer's weight."""
    theirs = dict(student.named_parameters())
    ours = dict(teacher.named_parameters())
    if {k: p.shape for k, p in theirs.items()} != {k: p.shape for k, p in ours.items()}:
        raise ValueError("teacher and student have different parameters: no LoRA joins them")
    linear = {f"{n}.weight" for n, m in teacher.named_modules() if isinstance(m, nn.Linear)}
    for name, parameter in theirs.items():
        yield name, parameter.float() - ours[name].float(), name in linear
