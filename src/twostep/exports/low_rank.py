"""The difference between two transformers, by the largest directions of each matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twostep.models.lora_files import Change

# Directions beyond those wanted, and rounds of powers: what a randomised decomposition needs to
# find them where singular values fall slowly (Halko, Martinsson, Tropp, arXiv 0909.4061).
_MORE, _ROUNDS = 16, 4
# Below this share of a matrix's side it is faster than a whole decomposition.
_SHARE = 4
_FIRST_GUESS = 32


@dataclass(frozen=True)
class LowRank:
    """A low-rank difference between two transformers.

    Attributes:
        changes: by module name.
        energy: share of the linear layers' squared Frobenius norm that is kept, 0 to 1.
        rest: squared difference in all other parameters, over that in the linear layers; LoRA
            files cannot carry it.
    """

    changes: dict[str, Change]
    energy: float
    rest: float


def largest_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, r), S (r,), V^T (r, columns) of a matrix's `rank` largest singular values, or fewer.

    Randomised where that is faster: then the directions are nearly the best ones, and S squared is
    still exactly what they keep of the matrix's Frobenius norm, squared. The same each time.
    """
    if is_randomised(matrix, rank):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + _MORE, niter=_ROUNDS)
        return u[:, :rank], s[:rank], v[:, :rank].T
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def is_randomised(matrix: Tensor, rank: int) -> bool:
    """Whether `largest_directions` is."""
    return _SHARE * (rank + _MORE) <= min(matrix.shape)


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
    guess = _FIRST_GUESS
    while True:
        shares, total, whole = _shares(teacher, student, guess)
        kept = 0.0
        for rank, share in enumerate(shares, 1):
            kept += share
            if kept >= energy * total * (1 - 1e-6):
                return rank
        if whole:
            return len(shares)
        guess *= 2


def _shares(teacher: nn.Module, student: nn.Module, rank: int) -> tuple[list[float], float, bool]:
    """What each of the first directions keeps, of all layers; of how much; whether that is all."""
    shares: list[float] = []
    total, whole = 0.0, True
    for _, change, is_linear in _differences(teacher, student):
        if not is_linear:
            continue
        total += change.double().square().sum().item()
        if is_randomised(change, rank):
            values, whole = largest_directions(change, rank)[1], False
        else:
            values = torch.linalg.svdvals(change)
        shares += [0.0] * (len(values) - len(shares))
        for index, value in enumerate(values.double().square().tolist()):
            shares[index] += value
    # A layer with few directions found hides what its others would keep: count as far as all know.
    return shares if whole else shares[:rank], total, whole


@torch.no_grad()
def low_rank_difference(teacher: nn.Module, student: nn.Module, rank: int) -> LowRank:
    """`student` less `teacher`, each linear layer's weight by its `rank` largest directions.

    Raises:
        ValueError: if `rank` is below 1 or the two have different layers.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    found: dict[str, Change] = {}
    kept = total = rest = 0.0
    for name, change, is_linear in _differences(teacher, student):
        if not is_linear:
            rest += change.square().sum().item()
            continue
        total += change.square().sum().item()
        u, s, v = largest_directions(change, rank)
        kept += s.square().sum().item()
        root = s.sqrt()
        found[name.removesuffix(".weight")] = Change(u * root, root[:, None] * v, 1.0)
    return LowRank(found, kept / total if total else 1.0, rest / total if total else 0.0)


def _differences(teacher: nn.Module, student: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Each parameter's name, its change in fp32, and whether it is a linear layer's weight."""
    theirs = dict(student.named_parameters())
    ours = dict(teacher.named_parameters())
    if {k: p.shape for k, p in theirs.items()} != {k: p.shape for k, p in ours.items()}:
        raise ValueError("teacher and student have different parameters: no LoRA joins them")
    linear = {f"{n}.weight" for n, m in teacher.named_modules() if isinstance(m, nn.Linear)}
    for name, parameter in theirs.items():
        yield name, parameter.float() - ours[name].float(), name in linear
