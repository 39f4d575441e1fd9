"""The student's turn: what it is made to learn of both its steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from twostep.distill.objectives.batch import Batch, Turn
from twostep.distill.objectives.critic import Level, Look
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.roles import Roles
from twostep.distill.objectives.terms import TERMS, Judged, Seen, TermLoss, draw_level
from twostep.families.family import PromptBatch
from twostep.method import losses
from twostep.method.flow import add_noise, clean_from_velocity, euler_step
from twostep.method.rollout import Rollout, two_step
from twostep.method.schedule import Schedule
from twostep.models.velocity import bind, guided_field
from twostep.recipe.schema import Recipe

# The two steps in recipe and log.
STEP_NAMES = ("step1", "final")


@dataclass(frozen=True)
class Sample:
    """What one of the student's steps pointed to, (B, C, H, W), and the critic's look at it."""

    clean: Tensor
    look: Look | None = None


class StudentTurn:
    """Builds the student's loss. Which terms are active is decided here, once.

    Attributes:
        critic_factor: of the adversarial terms, as far as the run is (`critic.weight_over_run`).
    """

    def __init__(self, recipe: Recipe, roles: Roles, schedule: Schedule) -> None:
        self.recipe, self.roles, self.schedule = recipe, roles, schedule
        self.end_to_end = recipe.student.gradient == "end_to_end"
        weights = dict(zip(STEP_NAMES, (recipe.losses.step1, recipe.losses.final), strict=True))
        levels = dict(zip(STEP_NAMES, (1.0, schedule.step2_sigma), strict=True))
        self.judged = {
            name: Judged(
                recipe,
                schedule,
                sigma,
                recipe.losses.tau_range_of(weights[name]),
                score=roles.score,
                fake=roles.fake_of(step),
                critic=roles.critic,
            )
            for step, (name, sigma) in enumerate(levels.items())
        }
        self._active: dict[str, list[tuple[str, float, TermLoss]]] = {
            name: [
                (term.name, own.weight * weight, term.loss)
                for term in TERMS
                if own.weight * (weight := getattr(own, term.name, 0.0))
            ]
            for name, own in weights.items()
        }
        # What is compared with the teacher's latents must begin where they began.
        self._on_cached_noise = any(
            name in ("regression", "trajectory")
            for terms in self._active.values()
            for name, *_ in terms
        )
        self.critic_factor = 1.0

    def rollout(self, noise: Tensor, prompts: PromptBatch, draws: Draws) -> Rollout:
        return two_step(
            bind(self.roles.first, prompts),
            bind(self.roles.second, prompts),
            noise,
            self.schedule,
            fresh=draws.normal_like,
            end_to_end=self.end_to_end,
        )

    def warmup(self, batch: Batch, draws: Draws) -> Turn:
        """Regression on cached teacher pairs, both steps."""
        rollout = self.rollout(batch.noise, batch.prompts, draws)
        final = losses.regression(rollout.clean2, batch.latents)
        if self.recipe.losses.warmup_step1_target == "trajectory":
            assert batch.trajectory is not None  # checked before the cache was opened
            step1 = losses.regression(rollout.latents2, batch.trajectory)
        else:
            step1 = losses.regression(rollout.clean1, batch.latents)
        loss = final + self.recipe.losses.step1.weight * step1
        terms = {"final/warmup": final.detach(), "step1/warmup": step1.detach()}
        return Turn(loss, terms)

    def __call__(self, batch: Batch, draws: Draws) -> Turn:
        return self.learn(batch, draws)[0]

    def learn(
        self, batch: Batch, draws: Draws, noise: Tensor | None = None
    ) -> tuple[Turn, dict[str, Sample]]:
        """The turn, and what the student made in it, by step; empty without a rollout.

        Args:
            noise: what the student begins with; drawn, or the cached if None.
        """
        self.roles.hold_score()
        total = batch.noise.new_zeros(())
        logged: dict[str, Tensor] = {}
        samples: dict[str, Sample] = {}
        if any(self._active.values()):
            if self._on_cached_noise:
                noise = batch.noise
            elif noise is None:
                noise = draws.normal_like(batch.noise)
            rollout = self.rollout(noise, batch.prompts, draws)
            level = self._level(batch, draws)
            for name, clean in zip(STEP_NAMES, (rollout.clean1, rollout.clean2), strict=True):
                value, look = self._judge(name, clean, batch, draws, level=level, logged=logged)
                total = total + value
                samples[name] = Sample(clean.detach(), None if look is None else look.detach())
            logged["latents/mean"] = rollout.clean2.detach().mean()
            logged["latents/std"] = rollout.clean2.detach().std()
        if self.recipe.losses.consistency:
            value = self._consistency(batch, draws)
            total = total + self.recipe.losses.consistency * value
            logged["consistency"] = value.detach()
        return Turn(total, logged), samples

    def _level(self, batch: Batch, draws: Draws) -> Level | None:
        """The one at which the critic looks at both steps; None where each draws its own."""
        if not (self.recipe.critic.one_look and self.recipe.uses_critic):
            return None
        return draw_level(batch.noise, draws, self.schedule, self.recipe.critic.tau_range)

    def _judge(
        self,
        name: str,
        clean: Tensor,
        batch: Batch,
        draws: Draws,
        *,
        level: Level | None,
        logged: dict[str, Tensor],
    ) -> tuple[Tensor, Look | None]:
        """The weighted terms of one step, added to what is logged; and the critic's look at it."""
        step, look = self.judged[name], None
        if level is not None and any(term == "adversarial" for term, *_ in self._active[name]):
            look = step.critic.look(clean, level, batch.prompts)
        seen, total = Seen(clean, batch, draws, look), clean.new_zeros(())
        for term, weight, loss in self._active[name]:
            value = loss(step, seen)
            factor = self.critic_factor if term == "adversarial" else 1.0
            total = total + factor * weight * value
            logged[f"{name}/{term}"] = value.detach()
        return total, look

    def _consistency(self, batch: Batch, draws: Draws) -> Tensor:
        """Latent consistency distillation (arXiv 2310.04378) without a target network (2310.14189).

        At neighbouring noise levels of the teacher's schedule, joined by a teacher step, the
        student must point to the same image.
        """
        pairs = list(pairwise(self.schedule.sigmas(self.recipe.teacher.steps)))
        chosen = torch.tensor([pairs[i] for i in draws.integers(len(batch.noise), len(pairs))])
        sigma, below = chosen.to(batch.noise).unbind(1)
        latents = add_noise(batch.latents, draws.normal_like(batch.noise), sigma)
        field = bind(self.roles.first, batch.prompts)
        clean = clean_from_velocity(latents, field(latents, sigma), sigma)
        with torch.no_grad():
            scale = self.recipe.teacher.guidance_scale
            teacher = guided_field(self.roles.teacher, batch.prompts, batch.empty, scale)
            stepped = euler_step(latents, teacher(latents, sigma), sigma, below)
            # At the last step this is the image itself: sigma is 0 there.
            target = clean_from_velocity(stepped, field(stepped, below), below)
        return losses.regression(clean, target)
