"""What comes due every few turns: validation, keeping the best student, the sample sheet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from twostep.data.cache.read import TeacherCache
from twostep.distill.best import BestStudent
from twostep.distill.checkpoint import TrainingState
from twostep.distill.objectives.roles import Roles
from twostep.distill.run_folder import RunFolder
from twostep.distill.sample_sheet import SampleSheet
from twostep.distill.validation import Validator
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import Placement
from twostep.runtime.distributed import World


class Checkup:
    """Looks at the averaged student. Every process must make the same calls.

    Args:
        computing: the context of every forward.
    """

    def __init__(
        self,
        recipe: Recipe,
        cache: TeacherCache,
        roles: Roles,
        state: TrainingState,
        *,
        folder: RunFolder,
        device: torch.device,
        world: World,
        computing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.state, self.world, self.computing = state, world, computing
        self.best = BestStudent(roles, state, folder=folder, world=world)
        with computing():
            self.validator = Validator(recipe, roles, cache, device=device, world=world)
        self.sheet: SampleSheet | None = None
        if world.is_first:
            decoder = cache.spec.teacher.decoder(Placement.on(device))
            self.sheet = SampleSheet(decoder, folder, count=recipe.training.sample_prompts)

    def __call__(self, *, draw: bool) -> dict[str, float]:
        """Measures the average and keeps it if it is the best so far; what to log."""
        validator = self.validator
        with self.state.ema.applied(), self.computing():
            seen = validator.measure()
        # All processes must see the same number, whatever their rounding.
        (distance,) = self.world.largest([seen.metrics["kernel_distance"]])
        self.best.offer(distance)
        if draw and self.sheet is not None:
            self.sheet.draw(
                seen.rollout,
                teacher=validator.teacher_latents,
                naive=validator.naive_latents,
                turn=self.state.progress.turn,
            )
        return {f"validation/{key}": value for key, value in seen.metrics.items()}
