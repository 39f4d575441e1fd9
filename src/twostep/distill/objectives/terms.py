"""The terms of the student's loss on a clean prediction: one entry for each weight in a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twostep.distill.objectives.batch import Batch
from twostep.distill.objectives.critic import Critic
from twostep.distill.objectives.draws import Draws
from twostep.method import losses
from twostep.method.flow import add_noise, clean_from_velocity
from twostep.method.rollout import VelocityField
from twostep.method.schedule import Schedule
from twostep.models.velocity import Velocity, bind, guided_field
from twostep.recipe.schema import Recipe


@dataclass(frozen=True)
class Judged:
    """One of the student's steps, and the networks that judge what it points to.

    Attributes:
        sigma: the noise level that the step starts from.
        score: trusted at every noise level.
        fake: follows this step's clean predictions.
    """

    recipe: Recipe
    schedule: Schedule
    sigma: float
    score: Velocity
    fake: Velocity
    critic: Critic


# (step, clean prediction (B, C, H, W), batch, draws) -> scalar
TermLoss = Callable[[Judged, Tensor, Batch, Draws], Tensor]


@dataclass(frozen=True)
class Term:
    """A term of the loss.

    Attributes:
        name: of its weight in the recipe, and of its record in the log behind `step1/` or `final/`.
        loss: unweighted.
        short: its name on the progress bar; empty: not shown.
    """

    name: str
    loss: TermLoss
    short: str = ""


def match_distribution(step: Judged, clean: Tensor, batch: Batch, draws: Draws) -> Tensor:
    """Distribution matching: the score against the fake, at a drawn noise level."""
    tau = draws.sigma(len(clean), step.schedule, step.recipe.losses.tau_range)
    with torch.no_grad():
        noisy = add_noise(clean, draws.normal_like(clean), tau)
        scale = step.recipe.score.guidance_scale
        score = guided_field(step.score, batch.prompts, batch.empty, scale)
        fake = bind(step.fake, batch.prompts)
        score_clean = _clean(score, noisy, tau)
        fake_clean = _clean(fake, noisy, tau)
    return losses.distribution_matching(clean, score_clean, fake_clean)


def augment_guidance(step: Judged, clean: Tensor, batch: Batch, draws: Draws) -> Tensor:
    """Decoupled DMD's guidance term (arXiv 2511.22677), at noise levels below the step's own."""
    low, high = step.recipe.losses.tau_range
    tau = draws.sigma(len(clean), step.schedule, (low, min(high, step.sigma)))
    with torch.no_grad():
        noisy = add_noise(clean, draws.normal_like(clean), tau)
        with_prompt = _clean(bind(step.score, batch.prompts), noisy, tau)
        without = _clean(bind(step.score, batch.empty), noisy, tau)
    return losses.guidance_augmentation(clean, with_prompt, without)


def fool_critic(step: Judged, clean: Tensor, batch: Batch, draws: Draws) -> Tensor:
    """The critic's opinion of the re-noised prediction."""
    tau = draws.sigma(len(clean), step.schedule, step.recipe.critic.tau_range)
    noisy = add_noise(clean, draws.normal_like(clean), tau)
    return losses.generator_adversarial(step.critic(noisy, tau, batch.prompts))


def regress(step: Judged, clean: Tensor, batch: Batch, draws: Draws) -> Tensor:
    """Distance to the teacher's image of the same noise."""
    return losses.regression(clean, batch.latents)


TERMS = (
    Term("distribution_matching", match_distribution, short="dm"),
    Term("guidance_augmentation", augment_guidance),
    Term("adversarial", fool_critic),
    Term("regression", regress),
)


def _clean(field: VelocityField, noisy: Tensor, tau: Tensor) -> Tensor:
    return clean_from_velocity(noisy, field(noisy, tau), tau)
