"""A full-parameter student as two LoRA files on its teacher, by truncated SVD."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from peft import LoraConfig
from torch import Tensor, nn

from twostep.errors import ExportError
from twostep.evaluation.metrics import peak_signal_to_noise
from twostep.exports.card import lora_card, origin_of
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.models.folder import ModelFolder
from twostep.models.student import PARTS, STEPS, write_lora_index
from twostep.runtime.files import write_text


def export_lora(
    student: ModelFolder,
    teacher: ModelFolder,
    out: Path,
    *,
    rank: int,
    energy: float | None = None,
    check: Sequence[str] = (),
    size: tuple[int, int] = (64, 64),
    name: str | None = None,
) -> list[str]:
    """Writes two LoRA files, their index and a card; what they keep and lose, a line each.

    Args: as `ExportOptions`; `name` is `out`'s if None.

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
        for step, model in zip(STEPS, models, strict=True):
            found = low_rank_difference(base, model, rank)
            path = save_lora(found, rank, out, f"{step}.safetensors")
            lines.append(
                f"{path.name}: rank {rank} keeps {100 * found.energy:.1f}% of the linear layers' "
                f"change; {100 * found.rest:.2f}% as much lies in other parameters and is lost"
            )
    except ValueError as error:
        raise ExportError(str(error)) from error
    named = str(teacher.path.resolve()) if Path(teacher.name).is_dir() else teacher.name
    write_lora_index(out, teacher=named, schedule=schedule)
    if check:
        lines.append(_difference_in_pictures(student, ModelFolder.open(out), check, size))
    # The card's script runs without this package, which alone knows the zoo.
    loaded = str(teacher.path) if teacher.name.startswith("zoo:") else teacher.name
    card = lora_card(
        name or out.name, loaded, schedule, rank=rank, facts=origin_of(student.path), lines=lines
    )
    write_text(out / "README.md", card)
    return lines


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


def save_lora(found: LowRank, rank: int, folder: Path, name: str) -> Path:
    """Writes a file that stock `load_lora_weights` reads, with its configuration as metadata."""
    modules = sorted(k.removesuffix(".lora_A.weight") for k in found.weights if "lora_A" in k)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules).to_dict()
    ZImagePipeline.save_lora_weights(
        folder,
        transformer_lora_layers=found.weights,
        weight_name=name,
        transformer_lora_adapter_metadata=_plain(config),
    )
    return folder / name


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a PEFT configuration."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
        if isinstance(value, str | int | float | bool | list | set) or value is None
    }
