"""The student's turn and the critic's turn: the only place that combines losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.roles import Role, Roles, bind_role
from twostep.families.zimage import PromptBatch
from twostep.method import losses
from twostep.method.flow import (
    add_noise,
    clean_from_velocity,
    euler_step,
    guide,
    sigma_schedule,
    velocity_target,
)
from twostep.method.rollout import Rollout, TwoStep, guided, two_step
from twostep.recipe.schema import (
    Recipe,
    StepLosses,
)


@dataclass(frozen=True)
class Batch:
    """What one turn is given; latents are (B, C, H, W), fp32.

    Attributes:
        noise: the cached samples' initial noise.
        latents: the teacher's results from that noise.
        trajectory: the teacher's latents at the student's second noise level, if cached.
        reals, real_prompts: the critic's real samples and their captions.
        prompts, empty: the captions, and the empty prompt B times.
    """

    noise: Tensor
    latents: Tensor
    trajectory: Tensor | None
    reals: Tensor
    real_prompts: PromptBatch
    prompts: PromptBatch
    empty: PromptBatch


@dataclass(frozen=True)
class Turn:
    """A scalar to minimise, and what to log; `terms` are detached."""

    loss: Tensor
    terms: dict[str, Tensor]


# (clean prediction, batch, draws) -> scalar
Term = Callable[[Tensor, Batch, Draws], Tensor]


class StudentTurn:
    """Builds the student's loss. Which terms are active is decided here, once."""

    def __init__(self, recipe: Recipe, roles: Roles, schedule: TwoStep, shift: float) -> None:
        self.recipe, self.roles, self.schedule, self.shift = recipe, roles, schedule, shift
        self.end_to_end = recipe.student.gradient == "end_to_end"
        self._terms = {
            "step1": self._active(recipe.losses.step1, step=0),
            "final": self._active(recipe.losses.final, step=1),
        }
        chosen = (recipe.losses.step1, recipe.losses.final)
        self._on_cached_noise = any(s.regression * s.weight > 0 for s in chosen)

    def _active(self, weights: StepLosses, step: int) -> list[tuple[str, float, Term]]:
        sigma_in = 1.0 if step == 0 else self.schedule.step2_sigma
        candidates: list[tuple[str, float, Term]] = [
            ("distribution_matching", weights.distribution_matching, self._match(step)),
            ("guidance_augmentation", weights.guidance_augmentation, self._augment(sigma_in)),
            ("adversarial", weights.adversarial, self._fool),
            (
                "regression",
                weights.regression,
                lambda x, batch, _: losses.regression(x, batch.latents),
            ),
        ]
        return [
            (name, weights.weight * w, term) for name, w, term in candidates if weights.weight * w
        ]

    def rollout(self, noise: Tensor, prompts: PromptBatch, draws: Draws) -> Rollout:
        fresh = draws.normal_like(noise) if self.schedule.transition == "renoise" else None
        return two_step(
            bind_role(self.roles.first, prompts),
            bind_role(self.roles.second, prompts),
            noise,
            self.schedule,
            self.end_to_end,
            fresh,
        )

    def warmup(self, batch: Batch, draws: Draws) -> Turn:
        """Regression on cached teacher pairs, both steps."""
        rollout = self.rollout(batch.noise, batch.prompts, draws)
        final = losses.regression(rollout.clean2, batch.latents)
        if self.recipe.losses.warmup_step1_target == "trajectory":
            assert batch.trajectory is not None  # checked when the loop starts
            step1 = losses.regression(rollout.latents2, batch.trajectory)
        else:
            step1 = losses.regression(rollout.clean1, batch.latents)
        loss = final + self.recipe.losses.step1.weight * step1
        terms = {"final/warmup": final.detach(), "step1/warmup": step1.detach()}
        return Turn(loss, terms)

    def __call__(self, batch: Batch, draws: Draws) -> Turn:
        total = batch.noise.new_zeros(())
        logged: dict[str, Tensor] = {}
        if any(self._terms.values()):
            noise = batch.noise if self._on_cached_noise else draws.normal_like(batch.noise)
            rollout = self.rollout(noise, batch.prompts, draws)
            for step, clean in (("step1", rollout.clean1), ("final", rollout.clean2)):
                for name, weight, term in self._terms[step]:
                    value = term(clean, batch, draws)
                    total = total + weight * value
                    logged[f"{step}/{name}"] = value.detach()
            logged["latents/mean"] = rollout.clean2.detach().mean()
            logged["latents/std"] = rollout.clean2.detach().std()
        if self.recipe.losses.consistency:
            value = self._be_consistent(batch, draws)
            total = total + self.recipe.losses.consistency * value
            logged["consistency"] = value.detach()
        return Turn(total, logged)

    def _be_consistent(self, batch: Batch, draws: Draws) -> Tensor:
        """Latent consistency distillation (arXiv 2310.04378) without a target network (2310.14189).

        At neighbouring noise levels of the teacher's schedule, joined by a teacher step, the
        student must point to the same image.
        """
        pairs = list(pairwise(sigma_schedule(self.recipe.teacher.steps, self.shift)))
        chosen = torch.tensor([pairs[i] for i in draws.integers(len(batch.noise), len(pairs))])
        sigma, below = chosen.to(batch.noise).unbind(1)
        latents = add_noise(batch.latents, draws.normal_like(batch.noise), sigma)
        field = bind_role(self.roles.first, batch.prompts)
        clean = clean_from_velocity(latents, field(latents, sigma), sigma)
        with torch.no_grad():
            teacher = guided(
                bind_role(self.roles.teacher, batch.prompts),
                bind_role(self.roles.teacher, batch.empty),
                self.recipe.teacher.guidance_scale,
            )
            stepped = euler_step(latents, teacher(latents, sigma), sigma, below)
            # At the last step this is the image itself: sigma is 0 there.
            target = clean_from_velocity(stepped, field(stepped, below), below)
        return losses.regression(clean, target)

    def _match(self, step: int) -> Term:
        def term(clean: Tensor, batch: Batch, draws: Draws) -> Tensor:
            tau = draws.sigma(len(clean), self.shift, self.recipe.losses.tau_range)
            with torch.no_grad():
                noisy = add_noise(clean, draws.normal_like(clean), tau)
                score = self._score_velocity(noisy, tau, batch)
                fake = self.roles.fake_of(step)(noisy, tau, batch.prompts).velocity
                score_clean = clean_from_velocity(noisy, score, tau)
                fake_clean = clean_from_velocity(noisy, fake, tau)
            return losses.distribution_matching(clean, score_clean, fake_clean)

        return term

    def _score_velocity(self, noisy: Tensor, tau: Tensor, batch: Batch) -> Tensor:
        conditional = self.roles.score(noisy, tau, batch.prompts).velocity
        scale = self.recipe.score.guidance_scale
        if not scale:
            return conditional
        return guide(conditional, self.roles.score(noisy, tau, batch.empty).velocity, scale)

    def _augment(self, sigma_in: float) -> Term:
        """Decoupled DMD's guidance term, at noise levels below the step's own."""
        low, high = self.recipe.losses.tau_range

        def term(clean: Tensor, batch: Batch, draws: Draws) -> Tensor:
            tau = draws.sigma(len(clean), self.shift, (low, min(high, sigma_in)))
            with torch.no_grad():
                noisy = add_noise(clean, draws.normal_like(clean), tau)
                with_prompt = self.roles.score(noisy, tau, batch.prompts).velocity
                without = self.roles.score(noisy, tau, batch.empty).velocity
                direction = clean_from_velocity(noisy, with_prompt, tau) - clean_from_velocity(
                    noisy, without, tau
                )
            return losses.toward(clean, direction)

        return term

    def _fool(self, clean: Tensor, batch: Batch, draws: Draws) -> Tensor:
        tau = draws.sigma(len(clean), self.shift, self.recipe.critic.tau_range)
        noisy = add_noise(clean, draws.normal_like(clean), tau)
        return losses.generator_adversarial(
            critic_logits(self.recipe, self.roles, noisy, tau, batch.prompts)
        )


class ScoreTurn:
    """Builds the score's loss while it is fitted: flow matching on the teacher's images."""

    def __init__(self, recipe: Recipe, roles: Roles, shift: float) -> None:
        self.recipe, self.roles, self.shift = recipe, roles, shift

    def __call__(self, batch: Batch, draws: Draws) -> Turn:
        dropout = self.recipe.score.caption_dropout
        if dropout:
            dropped = draws.chosen(len(batch.prompts), dropout)
            batch = replace(batch, prompts=batch.prompts.replace(dropped, batch.empty))
        loss = _follow(self.roles.score, batch.latents, batch, draws, self.recipe, self.shift)
        return Turn(loss, {"score/flow_matching": loss.detach()})


class CriticTurn:
    """Builds the fakes' loss and the critic's loss, on samples without gradient."""

    def __init__(self, recipe: Recipe, roles: Roles, student: StudentTurn) -> None:
        self.recipe, self.roles, self.student = recipe, roles, student
        weights = (recipe.losses.step1, recipe.losses.final)
        self._followed = [i for i, w in enumerate(weights) if w.weight * w.distribution_matching]
        self._judged = [i for i, w in enumerate(weights) if w.weight * w.adversarial]
        self._paired = recipe.critic.paired and recipe.data.reals == "teacher"

    def __call__(self, batch: Batch, draws: Draws) -> Turn:
        if not (self._followed or self._judged):
            return Turn(batch.noise.new_zeros(()), {})
        with torch.no_grad():
            # From the teacher's own noise, a real and a fake differ in what the critic is to see.
            pair = self._judged and self._paired
            noise = batch.noise if pair else draws.normal_like(batch.noise)
            rollout = self.student.rollout(noise, batch.prompts, draws)
        cleans = (rollout.clean1, rollout.clean2)
        total = batch.noise.new_zeros(())
        logged: dict[str, Tensor] = {}
        for step in self._followed:
            fake, shift = self.roles.fake_of(step), self.student.shift
            loss = _follow(fake, cleans[step], batch, draws, self.recipe, shift)
            total = total + loss
            logged[f"fake/step{step + 1}"] = loss.detach()
        for step in self._judged:
            loss, accuracy = self._judge(cleans[step], batch, draws)
            total = total + loss
            suffix = "" if step == 1 else "_step1"
            logged[f"critic/loss{suffix}"] = loss.detach()
            logged[f"critic/accuracy{suffix}"] = accuracy
        return Turn(total, logged)

    def _judge(self, clean: Tensor, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        settings = self.recipe.critic
        tau = draws.sigma(len(clean), self.student.shift, settings.tau_range)
        noise = draws.normal_like(clean)
        # Reals and fakes in one forward, re-noised alike.
        parts = [add_noise(batch.reals, noise, tau), add_noise(clean, noise, tau)]
        prompts = [batch.real_prompts, batch.prompts]
        if settings.r1:
            moved = batch.reals + settings.r1_noise * draws.normal_like(clean)
            parts.append(add_noise(moved, noise, tau))
            prompts.append(batch.real_prompts)
        copies = len(parts)
        logits = critic_logits(
            self.recipe,
            self.roles,
            torch.cat(parts),
            tau.repeat(copies),
            PromptBatch.cat(prompts),
        )
        real, fake, *perturbed = logits.chunk(copies)
        loss = losses.critic_adversarial(real, fake)
        if perturbed:
            loss = loss + settings.r1 * losses.approximate_r1(real, perturbed[0], settings.r1_noise)
        with torch.no_grad():
            right = (real.mean(1) > 0).float().mean() + (fake.mean(1) < 0).float().mean()
        return loss, right / 2


def _follow(
    role: Role, clean: Tensor, batch: Batch, draws: Draws, recipe: Recipe, shift: float
) -> Tensor:
    """Flow matching on `clean`, at the noise levels where the role will be asked."""
    tau = draws.sigma(len(clean), shift, recipe.losses.tau_range)
    noise = draws.normal_like(clean)
    velocity = role(add_noise(clean, noise, tau), tau, batch.prompts).velocity
    return losses.flow_matching(velocity, velocity_target(clean, noise))


def critic_logits(
    recipe: Recipe, roles: Roles, noisy: Tensor, tau: Tensor, prompts: PromptBatch
) -> Tensor:
    """The critic's logits (B, K) for re-noised latents, through the frozen teacher's features."""
    hidden = roles.teacher(noisy, tau, prompts, recipe.critic.layers).hidden
    return roles.critic(hidden, noisy.shape[2] // 2, noisy.shape[3] // 2)
