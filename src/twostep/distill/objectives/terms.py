"""The terms of the student's loss on a clean prediction: one entry for each weight in a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twostep.distill.objectives.batch import Batch
from twostep.distill.objectives.critic import Critic, Level, Look
from twostep.distill.objectives.draws import Draws
from twostep.method import losses
from twostep.method.flow import add_noise, clean_from_velocity, guide
from twostep.method.schedule import Schedule
from twostep.models.velocity import Velocity, bind
from twostep.recipe.schema import Recipe


@dataclass(frozen=True)
class Judged:
    """One of the student's steps, and the networks that judge what it points to.

    Attributes:
        sigma: the noise level that the step starts from.
        tau_range: at which noise levels score and fake judge its images.
        score: trusted at every noise level.
        fake: follows this step's clean predictions.
    """

    recipe: Recipe
    schedule: Schedule
    sigma: float
    tau_range: tuple[float, float]
    score: Velocity
    fake: Velocity
    critic: Critic

    @property
    def matches_on_looks(self) -> bool:
        """Whether the critic's look at a sample is the one that distribution matching needs."""
        same_levels = self.recipe.critic.tau_range == self.tau_range
        return self.critic.network is self.score and same_levels


@dataclass(frozen=True)
class Seen:
    """A clean prediction (B, C, H, W), and what its terms may need.

    Attributes:
        look: the critic's, with a gradient; None: none was made yet.
    """

    clean: Tensor
    batch: Batch
    draws: Draws
    look: Look | None = None

    def level(self, schedule: Schedule, bounds: tuple[float, float]) -> Level:
        """A noise level within `bounds`, and noise, of this row's own."""
        return draw_level(self.clean, self.draws, schedule, bounds)


def draw_level(
    like: Tensor, draws: Draws, schedule: Schedule, bounds: tuple[float, float]
) -> Level:
    """A noise level for each row, within `bounds`, and noise."""
    tau = draws.sigma(len(like), schedule, bounds)
    return Level(tau, draws.normal_like(like))


# (step, what there is to see) -> scalar
TermLoss = Callable[[Judged, Seen], Tensor]


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


def match_distribution(step: Judged, seen: Seen) -> Tensor:
    """Distribution matching: the score against the fake, at a drawn noise level."""
    batch, look = seen.batch, seen.look
    with torch.no_grad():
        if look is not None and step.matches_on_looks:
            level, noisy = look.level, look.noisy.detach()
            velocity = look.prediction.velocity.detach()
        else:
            level = seen.level(step.schedule, step.tau_range)
            noisy = level.add_to(seen.clean)
            velocity = step.score(noisy, level.tau, batch.prompts).velocity
        scale = step.recipe.score.guidance_scale
        if scale:
            without = step.score(noisy, level.tau, batch.empty).velocity
            velocity = guide(velocity, without, scale)
        score_clean = clean_from_velocity(noisy, velocity, level.tau)
        fake_clean = _clean(step.fake, noisy, level.tau, batch)
    return losses.distribution_matching(seen.clean, score_clean, fake_clean)


def augment_guidance(step: Judged, seen: Seen) -> Tensor:
    """Decoupled DMD's guidance term (arXiv 2511.22677), at noise levels below the step's own."""
    low, high = step.tau_range
    level = seen.level(step.schedule, (low, min(high, step.sigma)))
    with torch.no_grad():
        noisy = level.add_to(seen.clean)
        with_prompt = _clean(step.score, noisy, level.tau, seen.batch)
        velocity = step.score(noisy, level.tau, seen.batch.empty).velocity
        without = clean_from_velocity(noisy, velocity, level.tau)
    return losses.guidance_augmentation(seen.clean, with_prompt, without)


def fool_critic(step: Judged, seen: Seen) -> Tensor:
    """The critic's opinion of the re-noised prediction."""
    look = seen.look
    if look is None:
        level = seen.level(step.schedule, step.recipe.critic.tau_range)
        look = step.critic.look(seen.clean, level, seen.batch.prompts)
    return losses.generator_adversarial(step.critic.logits(look, learning=False))


def regress(step: Judged, seen: Seen) -> Tensor:
    """Distance to the teacher's image of the same noise."""
    return losses.regression(seen.clean, seen.batch.latents)


def follow_trajectory(step: Judged, seen: Seen) -> Tensor:
    """Distance between where step 1 leads and the teacher's latents there, of the same noise.

    As the first step of DP-DMD (arXiv 2602.03139) learns from the teacher alone.
    """
    trajectory = seen.batch.trajectory
    assert trajectory is not None  # checked before the cache was opened
    reached = add_noise(seen.clean, seen.batch.noise, step.schedule.step2_sigma)
    return losses.regression(reached, trajectory)


TERMS = (
    Term("distribution_matching", match_distribution, short="dm"),
    Term("guidance_augmentation", augment_guidance),
    Term("adversarial", fool_critic),
    Term("regression", regress),
    Term("trajectory", follow_trajectory),
)


def _clean(velocity: Velocity, noisy: Tensor, tau: Tensor, batch: Batch) -> Tensor:
    field = bind(velocity, batch.prompts)
    return clean_from_velocity(noisy, field(noisy, tau), tau)
