"""The turns of student, critic with fakes, and score: the only place that combines losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from twostep.distill.objectives.batch import Batch, Turn
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.roles import Roles
from twostep.distill.objectives.terms import TERMS, Judged, TermLoss
from twostep.families.family import PromptBatch
from twostep.method import losses
from twostep.method.flow import add_noise, clean_from_velocity, euler_step, velocity_target
from twostep.method.rollout import Rollout, two_step
from twostep.method.schedule import Schedule
from twostep.models.velocity import Velocity, bind, guided_field
from twostep.recipe.schema import Recipe

# The two steps in recipe and log.
STEP_NAMES = ("step1", "final")


@dataclass(frozen=True)
class Objectives:
    """What a run's updates minimise."""

    student: StudentTurn
    critic: CriticTurn
    score: ScoreTurn

    @staticmethod
    def build(recipe: Recipe, roles: Roles, schedule: Schedule) -> Objectives:
        student = StudentTurn(recipe, roles, schedule)
        return Objectives(
            student, CriticTurn(recipe, roles, student), ScoreTurn(recipe, roles, schedule)
        )


class StudentTurn:
    """Builds the student's loss. Which terms are active is decided here, once."""

    def __init__(self, recipe: Recipe, roles: Roles, schedule: Schedule) -> None:
        self.recipe, self.roles, self.schedule = recipe, roles, schedule
        self.end_to_end = recipe.student.gradient == "end_to_end"
        weights = dict(zip(STEP_NAMES, (recipe.losses.step1, recipe.losses.final), strict=True))
        levels = dict(zip(STEP_NAMES, (1.0, schedule.step2_sigma), strict=True))
        self._judged = {
            name: Judged(
                recipe,
                schedule,
                sigma,
                score=roles.score,
                fake=roles.fake_of(step),
                critic=roles.critic,
            )
            for step, (name, sigma) in enumerate(levels.items())
        }
        self._active: dict[str, list[tuple[str, float, TermLoss]]] = {
            name: [
                (term.name, own.weight * getattr(own, term.name), term.loss)
                for term in TERMS
                if own.weight * getattr(own, term.name)
            ]
            for name, own in weights.items()
        }
        self._on_cached_noise = any(w.regression * w.weight > 0 for w in weights.values())

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
        total = batch.noise.new_zeros(())
        logged: dict[str, Tensor] = {}
        if any(self._active.values()):
            noise = batch.noise if self._on_cached_noise else draws.normal_like(batch.noise)
            rollout = self.rollout(noise, batch.prompts, draws)
            for name, clean in zip(STEP_NAMES, (rollout.clean1, rollout.clean2), strict=True):
                for term, weight, loss in self._active[name]:
                    value = loss(self._judged[name], clean, batch, draws)
                    total = total + weight * value
                    logged[f"{name}/{term}"] = value.detach()
            logged["latents/mean"] = rollout.clean2.detach().mean()
            logged["latents/std"] = rollout.clean2.detach().std()
        if self.recipe.losses.consistency:
            value = self._consistency(batch, draws)
            total = total + self.recipe.losses.consistency * value
            logged["consistency"] = value.detach()
        return Turn(total, logged)

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


class ScoreTurn:
    """Builds the score's loss while it is fitted: flow matching on the teacher's images."""

    def __init__(self, recipe: Recipe, roles: Roles, schedule: Schedule) -> None:
        self.recipe, self.roles, self.schedule = recipe, roles, schedule

    def __call__(self, batch: Batch, draws: Draws) -> Turn:
        dropout = self.recipe.score.caption_dropout
        if dropout:
            dropped = draws.chosen(len(batch.prompts), dropout)
            batch = replace(batch, prompts=batch.prompts.replace(dropped, batch.empty))
        fit = FlowFit(self.schedule, self.recipe.losses.tau_range)
        loss = fit(self.roles.score, batch.latents, batch.prompts, draws)
        return Turn(loss, {"score/flow_matching": loss.detach()})


class CriticTurn:
    """Builds the fakes' loss and the critic's loss, on samples without gradient."""

    def __init__(self, recipe: Recipe, roles: Roles, student: StudentTurn) -> None:
        self.recipe, self.roles, self.student = recipe, roles, student
        weights = (recipe.losses.step1, recipe.losses.final)
        self._followed = [i for i, w in enumerate(weights) if w.weight * w.distribution_matching]
        self._judged = [i for i, w in enumerate(weights) if w.weight * w.adversarial]
        self._paired = recipe.critic.paired and recipe.data.reals == "teacher"
        self._fit = FlowFit(student.schedule, recipe.losses.tau_range)

    def __call__(self, batch: Batch, draws: Draws) -> Turn:
        if not (self._followed or self._judged):
            return Turn(batch.noise.new_zeros(()), {})
        pair = bool(self._judged) and self._paired
        total = batch.noise.new_zeros(())
        logged: dict[str, Tensor] = {}
        cleans: tuple[Tensor, Tensor] | None = None
        if self._followed or not pair:
            cleans = self._samples(draws.normal_like(batch.noise), batch, draws)
        for step in self._followed:
            assert cleans is not None
            loss = self._fit(self.roles.fake_of(step), cleans[step], batch.prompts, draws)
            total = total + loss
            logged[f"fake/{STEP_NAMES[step]}"] = loss.detach()
        if pair or cleans is None:
            # From the teacher's own noise, a real and a fake differ in what the critic is to see.
            # The fakes have none of it: they must know the student on noise that it never met.
            cleans = self._samples(batch.noise, batch, draws)
        for step in self._judged:
            loss, accuracy = self._judge(cleans[step], batch, draws)
            total = total + loss
            logged[f"critic/loss_{STEP_NAMES[step]}"] = loss.detach()
            logged[f"critic/accuracy_{STEP_NAMES[step]}"] = accuracy
        return Turn(total, logged)

    @torch.no_grad()
    def _samples(self, noise: Tensor, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        rollout = self.student.rollout(noise, batch.prompts, draws)
        return rollout.clean1, rollout.clean2

    def _judge(self, clean: Tensor, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        settings = self.recipe.critic
        tau = draws.sigma(len(clean), self.student.schedule, settings.tau_range)
        noise = draws.normal_like(clean)
        # Reals and fakes in one forward, re-noised alike.
        parts = [add_noise(batch.reals, noise, tau), add_noise(clean, noise, tau)]
        prompts = [batch.real_prompts, batch.prompts]
        if settings.r1:
            moved = batch.reals + settings.r1_noise * draws.normal_like(clean)
            parts.append(add_noise(moved, noise, tau))
            prompts.append(batch.real_prompts)
        copies = len(parts)
        noisy, levels = torch.cat(parts), tau.repeat(copies)
        logits = self.roles.critic(noisy, levels, PromptBatch.cat(prompts))
        real, fake, *perturbed = logits.chunk(copies)
        loss = losses.critic_adversarial(real, fake)
        if perturbed:
            loss = loss + settings.r1 * losses.approximate_r1(real, perturbed[0], settings.r1_noise)
        with torch.no_grad():
            right = (real.mean(1) > 0).float().mean() + (fake.mean(1) < 0).float().mean()
        return loss, right / 2


@dataclass(frozen=True)
class FlowFit:
    """Flow matching of a network on clean latents, at the noise levels where it will be asked."""

    schedule: Schedule
    bounds: tuple[float, float]

    def __call__(
        self, velocity: Velocity, clean: Tensor, prompts: PromptBatch, draws: Draws
    ) -> Tensor:
        tau = draws.sigma(len(clean), self.schedule, self.bounds)
        noise = draws.normal_like(clean)
        predicted = velocity(add_noise(clean, noise, tau), tau, prompts).velocity
        return losses.flow_matching(predicted, velocity_target(clean, noise))
