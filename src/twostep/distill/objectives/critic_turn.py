"""The turn of fakes and critic on samples without gradient, and it and the student's as one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twostep.distill.objectives.batch import Batch, Turn
from twostep.distill.objectives.critic import looks_apart
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.flow_fit import FlowFit
from twostep.distill.objectives.roles import Roles
from twostep.distill.objectives.student_turn import STEP_NAMES, Sample, StudentTurn
from twostep.distill.objectives.terms import draw_level
from twostep.families.family import PromptBatch
from twostep.method import losses
from twostep.recipe.schema import Recipe

Samples = dict[str, Sample]


class CriticTurn:
    """Builds the fakes' loss and the critic's loss."""

    def __init__(self, recipe: Recipe, roles: Roles, student: StudentTurn) -> None:
        self.recipe, self.roles, self.student = recipe, roles, student
        weights = dict(zip(STEP_NAMES, (recipe.losses.step1, recipe.losses.final), strict=True))
        self._followed = [n for n, w in weights.items() if w.weight * w.distribution_matching]
        self._judged = [n for n, w in weights.items() if w.weight * w.adversarial]
        # With images that are not the teacher's there are no pairs.
        paired = recipe.critic.paired and recipe.data.reals == "teacher"
        self.paired = bool(self._judged) and paired
        self._fit = {
            name: FlowFit(student.schedule, recipe.losses.tau_range_of(own))
            for name, own in weights.items()
        }

    def __call__(self, batch: Batch, draws: Draws) -> Turn:
        self.roles.hold_score()
        if not (self._followed or self._judged):
            return Turn(batch.noise.new_zeros(()), {})
        fresh: Samples | None = None
        if self._followed or not self.paired:
            fresh = self._samples(draws.normal_like(batch.noise), batch, draws)
        # From the teacher's own noise, a real and a fake differ in what the critic is to see. The
        # fakes have none of it: they must know the student on noise that it never met.
        judged = self._samples(batch.noise, batch, draws) if self.paired else fresh
        assert judged is not None
        total, logged = self.follow(fresh or judged, batch.prompts, draws)
        loss, more = self.judge(judged, batch, draws)
        return Turn(total + loss, logged | more)

    @torch.no_grad()
    def _samples(self, noise: Tensor, batch: Batch, draws: Draws) -> Samples:
        rollout = self.student.rollout(noise, batch.prompts, draws)
        cleans = (rollout.clean1, rollout.clean2)
        return {name: Sample(clean) for name, clean in zip(STEP_NAMES, cleans, strict=True)}

    def follow(
        self, samples: Samples, prompts: PromptBatch, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The fakes' loss, and what to log."""
        total, logged = _zero(samples), {}
        for name in self._followed:
            fake = self.roles.fake_of(STEP_NAMES.index(name))
            loss = self._fit[name](fake, samples[name].clean, prompts, draws)
            total = total + loss
            logged[f"fake/{name}"] = loss.detach()
        return total, logged

    def judge(
        self, samples: Samples, batch: Batch, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss, and what to log; looks that the samples bring are not made again."""
        total, logged = _zero(samples), {}
        groups = [[name] for name in self._judged]
        if self.recipe.critic.one_look:
            groups = [self._judged] if self._judged else []
        for names in groups:
            for name, real, fake, moved in self._verdicts(names, samples, batch, draws):
                loss = losses.critic_adversarial(real, fake)
                if moved is not None:
                    settings = self.recipe.critic
                    penalty = losses.approximate_r1(real, moved, settings.r1_noise)
                    loss = loss + settings.r1 * penalty
                total = total + loss
                right = (real.mean(1) > 0).float().mean() + (fake.mean(1) < 0).float().mean()
                logged[f"critic/loss_{name}"] = loss.detach()
                logged[f"critic/accuracy_{name}"] = right.detach() / 2
        return total, logged

    def _verdicts(
        self, names: list[str], samples: Samples, batch: Batch, draws: Draws
    ) -> list[tuple[str, Tensor, Tensor, Tensor | None]]:
        """Logits of reals, of each step's fakes and of moved reals, all re-noised alike."""
        critic, settings = self.roles.critic, self.recipe.critic
        known = {name: look for name in names if (look := samples[name].look) is not None}
        unknown = [name for name in names if name not in known]
        level = (
            next(iter(known.values())).level
            if known
            else draw_level(batch.noise, draws, self.student.schedule, settings.tau_range)
        )
        # All that is not known yet in one forward, the reals first.
        parts = [batch.reals, *(samples[name].clean for name in unknown)]
        prompts = [batch.real_prompts, *[batch.prompts] * len(unknown)]
        if settings.r1:
            parts.append(batch.reals + settings.r1_noise * draws.normal_like(batch.reals))
            prompts.append(batch.real_prompts)
        many = level.repeat(len(parts))
        with torch.no_grad():
            look = critic.look(torch.cat(parts), many, PromptBatch.cat(prompts))
        reals, *others = looks_apart(look, len(parts))
        looks = known | dict(zip(unknown, others, strict=False))
        real = critic.logits(reals, learning=True)
        moved = critic.logits(others[-1], learning=True) if settings.r1 else None
        return [(n, real, critic.logits(looks[n], learning=True), moved) for n in names]


@dataclass(frozen=True)
class JointTurn:
    """The student's turn, and that of fakes and critic on what the student made in it.

    One rollout and one look at it serve all. With paired samples every other row of a batch begins
    with cached noise and teaches the critic, the rest with fresh noise and teaches the fakes; the
    student learns from all.
    """

    student: StudentTurn
    critic: CriticTurn

    def __call__(self, batch: Batch, draws: Draws) -> Turn:
        noise = draws.normal_like(batch.noise)
        cached = [False] * len(noise)
        if self.critic.paired:
            cached = [row % 2 == 0 for row in draws.places(len(noise))]
            chosen = torch.tensor(cached, device=noise.device).view(-1, 1, 1, 1)
            noise = torch.where(chosen, batch.noise, noise)
        turn, samples = self.student.learn(batch, draws, noise)
        if not samples:
            return replace(turn, then=lambda: self.critic(batch, draws))
        return replace(turn, then=lambda: self._rest(samples, cached, batch, draws))

    def _rest(self, samples: Samples, cached: list[bool], batch: Batch, draws: Draws) -> Turn:
        loss, logged = self.critic.judge(samples, batch, draws)
        fresh = [row for row, known in enumerate(cached) if not known]
        share = 1.0
        if self.critic.paired:
            # The mean over the fresh half of the whole batch, whatever lies in this part of it.
            share = 2 * len(fresh) / len(cached)
        if fresh:
            own = {name: Sample(sample.clean[fresh]) for name, sample in samples.items()}
            followed, more = self.critic.follow(own, batch.prompts.rows(fresh), draws.only(fresh))
            loss = loss + share * followed
            logged |= {key: share * value for key, value in more.items()}
        return Turn(loss, logged)


def _zero(samples: Samples) -> Tensor:
    return next(iter(samples.values())).clean.new_zeros(())
