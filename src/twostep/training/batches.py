"""What each turn is given: samples of the cache, and the critic's reals."""

from __future__ import annotations

from pathlib import Path

import torch

from twostep.backbones.zimage import PromptBatch
from twostep.config import Recipe
from twostep.reals import ExternalReals
from twostep.teacher_cache import Plan, TeacherCache
from twostep.training.turns import Batch


class Batches:
    """The batches of a run, on `device`; a batch is a function of its number and a seed."""

    def __init__(
        self, recipe: Recipe, plan: Plan, cache: TeacherCache, device: torch.device
    ) -> None:
        self.size, self.cache, self.device = recipe.training.batch_size, cache, device
        self.reals = None
        if recipe.data.reals != "teacher":
            size = (recipe.data.height, recipe.data.width)
            self.reals = ExternalReals(Path(recipe.data.reals), plan.teacher, size)
        self.empty = PromptBatch.collate([cache.empty_embeds], device)

    def read(self, number: int, seed: int, rows: slice | None = None) -> Batch:
        """The rows of one batch; all of them if None."""
        rows = rows or slice(0, self.size)
        samples = self.cache.read(self.cache.batch_ids(number, self.size, seed)[rows])
        latents = samples.latents.to(self.device)
        prompts = PromptBatch.collate(samples.embeds, self.device)
        reals, real_prompts = latents, prompts
        if self.reals is not None:
            drawn, embeds = self.reals.draw(number, self.size)
            reals = drawn[rows].to(self.device)
            if embeds is not None:
                real_prompts = PromptBatch.collate(embeds[rows], self.device)
        trajectory = samples.trajectory
        return Batch(
            noise=samples.noise.to(self.device),
            latents=latents,
            trajectory=None if trajectory is None else trajectory.to(self.device),
            reals=reals,
            real_prompts=real_prompts,
            prompts=prompts,
            empty=self.empty.expand(len(latents)),
        )
