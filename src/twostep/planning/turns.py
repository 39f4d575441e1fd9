"""A turn of the trainer, run without memory: what comes alive at its peak, and its operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch

from twostep.distill.objectives.batch import Batch, Turn
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.roles import Roles
from twostep.distill.objectives.turns import Objectives
from twostep.planning.weightless import CPU
from twostep.recipe.schema import Recipe
from twostep.runtime.memory_meter import gradients_dropped, live_bytes


@dataclass(frozen=True)
class Counted:
    """Bytes alive at the peak beside what was there, and operations."""

    peak: int
    operations: int


def turns_of(recipe: Recipe, objectives: Objectives) -> dict[str, Callable[[Batch, Draws], Turn]]:
    """The turns that a run of `recipe` has, by name."""
    turns: dict[str, Callable[[Batch, Draws], Turn]] = {}
    if recipe.score.fit_turns:
        turns["score"] = objectives.score
    if recipe.losses.warmup_turns:
        turns["warm-up"] = objectives.student.warmup
    turns |= {"student": objectives.student, "critic": objectives.critic}
    return turns | ({"joint": objectives.joint} if recipe.training.joint_turns else {})


def turns_of_a_student(recipe: Recipe) -> dict[str, int]:
    """How many of each turn one update of the student comes with, after the warm-ups."""
    settings = recipe.training
    found = {"joint" if settings.joint_turns else "student": 1}
    alone = settings.critic_turns - settings.joint_turns
    return found | ({"critic": alone} if alone else {})


def count_turn(
    turn: Callable[[Batch, Draws], Turn],
    roles: Roles,
    batch: Batch,
    recipe: Recipe,
    *,
    alternates: bool = False,
) -> Counted:
    """One turn forwards and backwards; bytes alive at the peak beside weights and gradients.

    All gradients are there when the second micro-batch begins, and sharded ones are reduced as
    they come: activations are counted without them, not less what they are at the end.

    Args:
        alternates: its rows differ by their place in a batch, every other one; of an odd number of
            them, those that begin with either are counted and operations are the mean.
    """
    rows = len(batch.noise)
    alternate = alternates and rows % 2 == 1 and recipe.training.batch_size > 1
    counted = []
    for first in (0, rows)[: 1 + alternate]:
        draws = Draws(0, 0, "student", device=CPU, rows=slice(first, first + rows))
        modules = roles.trained_modules().values()
        parameters = chain.from_iterable(module.parameters() for module in modules)
        with gradients_dropped(parameters), live_bytes() as live:
            with torch.autocast("cpu", torch.bfloat16, recipe.training.autocast):
                found = turn(batch, draws)
            found.backward()
        counted.append(live)
    operations = sum(live.operations for live in counted) // len(counted)
    return Counted(max(live.peak for live in counted), operations)


def gathered_bytes(roles: Roles) -> int:
    """With sharded weights: a block as it runs and the next, whole, and its gradients."""
    blocks = roles.teacher.model.layers
    return max(sum(p.numel() for p in block.parameters()) for block in blocks) * (2 * 2 + 4)
