"""Watches a student while it trains: against the teacher, at equal noise, in the teacher's eyes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twostep.data.cache.read import TeacherCache
from twostep.distill.held_out import HeldOut
from twostep.distill.objectives.roles import Roles
from twostep.evaluation.metrics import kernel_distance, pairwise_diversity
from twostep.evaluation.prompts import PromptSet
from twostep.families.family import PromptBatch
from twostep.method.flow import add_noise
from twostep.method.rollout import Rollout, euler, seeded_noise, two_step
from twostep.models.velocity import bind, guided_field
from twostep.recipe.schema import Recipe
from twostep.runtime.distributed import World
from twostep.runtime.images import pictures_at_once
from twostep.runtime.randomness import Stream, seeds_of

# Nearly clean: the features must see the picture, yet stay where the teacher was trained.
_FEATURE_SIGMA = 0.1
# Of a channel, against the median channel's.
_LEAST_SPREAD = 0.1


@dataclass(frozen=True)
class Validation:
    """One look at the student; distances and ratios, see `Validator.measure`."""

    rollout: Rollout
    metrics: dict[str, float]


class Validator:
    """Prompts and noise that training never uses, of the recipe's first size; two seeds a prompt.

    Several processes share the images and then all know all of them.
    """

    def __init__(
        self,
        recipe: Recipe,
        roles: Roles,
        cache: TeacherCache,
        *,
        device: torch.device,
        world: World,
    ) -> None:
        self.recipe, self.roles, self.device, self.world = recipe, roles, device, world
        self.schedule = cache.spec.schedule
        self._at_once = pictures_at_once(recipe.data.height, recipe.data.width)
        held = HeldOut.of(recipe, cache.spec)
        samples = cache.read(held.samples)
        self.prompts = PromptSet(samples.prompts, None, 2)
        count = len(self.prompts)
        self.embeds = samples.embeds * 2
        seeds = seeds_of(recipe.data.seed, Stream.VALIDATION_NOISE, 2 * count)
        shape = (samples.latents.shape[1], samples.latents.shape[2], samples.latents.shape[3])
        self.noise = seeded_noise(seeds[:count], shape)
        self.feature_noise = seeded_noise(seeds[count:], shape)
        self.empty = cache.empty_embeds
        self.teacher_latents = self._teacher(recipe.teacher.steps)
        self.naive_latents = self._teacher(2)
        # Distances are to teacher images of other prompts and noise: a student is to match a
        # distribution, and the estimator takes pairs that share either for more than equality.
        others = cache.read(held.reference)
        reference = self._hidden(others.latents, others.embeds)
        # Channels of a hidden state differ in scale by orders of magnitude; each counts alike.
        # Of few images some channel hardly varies, by chance, and would outshine all others.
        std = reference.std(0)
        self._mean = reference.mean(0)
        self._std = std.clamp_min(_LEAST_SPREAD * std.median().item())
        self.reference = self._standardised(reference)
        self.start_distance = kernel_distance(self._features(self.naive_latents), self.reference)
        self.teacher_diversity = pairwise_diversity(
            self._features(self.teacher_latents), self.prompts.groups
        )

    @torch.no_grad()
    def _teacher(self, steps: int) -> Tensor:
        sigmas = self.schedule.sigmas(steps)
        empty = PromptBatch.collate([self.empty], self.device)
        parts = []
        for rows in self._parts(len(self.noise)):
            prompts = self._prompts(self.embeds, rows)
            scale = self.recipe.teacher.guidance_scale
            field = guided_field(self.roles.teacher, prompts, empty, scale)
            parts.append(euler(field, self.noise[rows].to(self.device), sigmas))
        return self.world.gather(torch.cat(parts), len(self.noise))

    def _parts(self, count: int) -> Sequence[Tensor]:
        """Batches of this process's share of `count` rows."""
        return torch.tensor(self.world.share(count)).split(self._at_once)

    def _prompts(self, embeds: list[Tensor], rows: Tensor) -> PromptBatch:
        return PromptBatch.collate([embeds[i] for i in rows.tolist()], self.device)

    @torch.no_grad()
    def student(self) -> Rollout:
        """The student's rollout from the validation noise, on CPU."""
        parts = []
        for rows in self._parts(len(self.noise)):
            prompts = self._prompts(self.embeds, rows)
            noise = self.noise[rows].to(self.device)
            first, second = (bind(r, prompts) for r in (self.roles.first, self.roles.second))
            parts.append(two_step(first, second, noise, self.schedule))
        return Rollout(
            *(
                self.world.gather(torch.cat([getattr(p, n) for p in parts]), len(self.noise))
                for n in ("clean1", "latents2", "clean2")
            )
        )

    def _features(self, latents: Tensor) -> Tensor:
        """What the teacher sees in images of the validation's prompts, fp64 (N, 2 * dim)."""
        return self._standardised(self._hidden(latents, self.embeds))

    def _standardised(self, hidden: Tensor) -> Tensor:
        """Each channel with the reference's mean and spread as 0 and 1."""
        return (hidden - self._mean) / self._std

    @torch.no_grad()
    def _hidden(self, latents: Tensor, embeds: list[Tensor]) -> Tensor:
        """Mean and spread over tokens of the teacher's middle hidden states, fp64 (N, 2 * dim)."""
        parts = []
        for rows in self._parts(len(latents)):
            noisy = add_noise(latents[rows], self.feature_noise[rows], _FEATURE_SIGMA)
            sigma = torch.full((len(rows),), _FEATURE_SIGMA, device=self.device)
            taps = (self.roles.teacher.model.depth // 2,)
            out = self.roles.teacher(
                noisy.to(self.device), sigma, self._prompts(embeds, rows), taps
            )
            hidden = out.hidden[0].double()
            parts.append(torch.cat([hidden.mean(1), hidden.std(1)], dim=1))
        return self.world.gather(torch.cat(parts), len(latents))

    def measure(self) -> Validation:
        """Compares the student as it is now with the teacher.

        `kernel_distance`: on standardised features, to cached teacher images of other prompts (0
        on average when equal).
        `step1_distance`: the same for the step-1 preview. `diversity`: spread over seeds, as a
        ratio to the teacher's. `latents_std`: ratio to the teacher's. `latents_mean`: shift in
        the teacher's standard deviations. All NaN where the student's images are not finite.
        """
        rollout = self.student()
        features, previews = (self._features(x) for x in (rollout.clean2, rollout.clean1))
        if not bool(torch.stack([features, previews]).isfinite().all()):
            return Validation(rollout, {"kernel_distance": math.nan})
        teacher = self.teacher_latents
        metrics = {
            "kernel_distance": kernel_distance(features, self.reference),
            "step1_distance": kernel_distance(previews, self.reference),
            "diversity": pairwise_diversity(features, self.prompts.groups) / self.teacher_diversity,
            "latents_std": (rollout.clean2.std() / teacher.std()).item(),
            "latents_mean": ((rollout.clean2.mean() - teacher.mean()) / teacher.std()).item(),
        }
        return Validation(rollout, metrics)
