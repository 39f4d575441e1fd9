"""What comes due every few turns: validation, keeping the best student, the sample sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from twostep.data.cache.read import TeacherCache
from twostep.distill.best import BestStudent
from twostep.distill.checkpoint import TrainingState
from twostep.distill.objectives.roles import Roles
from twostep.distill.run_folder import RunFolder
from twostep.distill.sample_sheet import SampleSheet
from twostep.distill.update import note_finite
from twostep.distill.validation import Validator
from twostep.evaluation.scorers import Scorer
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import Placement
from twostep.runtime.distributed import World
from twostep.runtime.notices import notice

# Images behind a distance that means something.
_ENOUGH = 6
# As the recipe's setting says.
_TELLING = 64


class Checkup:
    """Looks at the averaged student. Every process must make the same calls.

    Args:
        scorers: for `training.validation_scores`, in its order.
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
        scorers: Sequence[Scorer],
        computing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.state, self.world, self.computing = state, world, computing
        self.best = BestStudent(roles, state, folder=folder, world=world)
        with computing():
            self.validator = Validator(recipe, roles, cache, device=device, world=world)
        # Of fewer the distance is chance, and no ground to call a run diverged.
        seen = len(self.validator.reference)
        if seen < _TELLING and world.is_first:
            notice(
                f"validation has {seen} images: fewer than {_TELLING} tell little, and the best "
                "student may be chance; more prompts (data.prompt_count) give more"
            )
        if seen >= _ENOUGH:
            state.progress.start_distance = self.validator.start_distance
        self.max_non_finite = recipe.training.max_non_finite
        self.by_score = recipe.training.best_by == "score"
        self.scorers = scorers
        self.decoder = cache.spec.teacher.decoder(Placement.on(device))
        self.sheet = SampleSheet(self.decoder, folder, count=recipe.training.sample_prompts)

    def __call__(self, *, draw: bool) -> dict[str, float]:
        """Measures the average and keeps it if it is the best so far; what to log."""
        validator = self.validator
        with self.state.ema.applied(), self.computing():
            seen = validator.measure()
        finite = all(map(math.isfinite, seen.metrics.values()))
        note_finite(self.state.progress, "validation", accepted=finite, limit=self.max_non_finite)
        if not finite:  # nothing that could be judged, kept or drawn
            return {"validation/finite": 0.0}
        scores = self._scores(seen.rollout.clean2) if self.world.is_first else {}
        values = {**seen.metrics, **scores}
        distance = seen.metrics["kernel_distance"]
        if self.by_score:
            distance = -math.inf  # of the processes that did not judge
            if self.world.is_first:
                first = next(iter(scores.values()))
                distance = -first if math.isfinite(first) else math.inf
        # All processes must see the same number, whatever their rounding.
        (distance,) = self.world.largest([distance])
        self.best.offer(distance, seen.metrics)
        if draw and self.world.is_first:
            self.sheet.draw(
                seen.rollout,
                teacher=validator.teacher_latents,
                naive=validator.naive_latents,
                turn=self.state.progress.turn,
            )
        return {f"validation/{key}": value for key, value in values.items()}

    def _scores(self, latents: Tensor) -> dict[str, float]:
        """The mean of each score over the student's images that it judges."""
        found: dict[str, float] = {}
        for score in self.scorers:
            images = self.decoder.decode(latents).cpu()
            for name, each in score(images, self.validator.prompts).items():
                found[f"score/{name}"] = each.nanmean().item()
        return found
