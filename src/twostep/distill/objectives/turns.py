"""The turns of a run; the score's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from twostep.distill.objectives.batch import Batch, Turn
from twostep.distill.objectives.critic_turn import CriticTurn, JointTurn
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.flow_fit import FlowFit
from twostep.distill.objectives.roles import Roles
from twostep.distill.objectives.student_turn import StudentTurn
from twostep.method.schedule import Schedule
from twostep.recipe.schema import Recipe


@dataclass(frozen=True)
class Objectives:
    """What a run's updates minimise."""

    student: StudentTurn
    critic: CriticTurn
    joint: JointTurn
    score: ScoreTurn

    @staticmethod
    def build(recipe: Recipe, roles: Roles, schedule: Schedule) -> Objectives:
        student = StudentTurn(recipe, roles, schedule)
        critic = CriticTurn(recipe, roles, student)
        joint = JointTurn(student, critic)
        return Objectives(student, critic, joint, ScoreTurn(recipe, roles, schedule))


class ScoreTurn:
    """Builds the score's loss while it is fitted: flow matching on the teacher's images."""

    def __init__(self, recipe: Recipe, roles: Roles, schedule: Schedule) -> None:
        self.recipe, self.roles, self.schedule = recipe, roles, schedule

    def __call__(self, batch: Batch, draws: Draws) -> Turn:
        self.roles.hold_score(False)
        dropout = self.recipe.score.caption_dropout
        if dropout:
            dropped = draws.chosen(len(batch.prompts), dropout)
            batch = replace(batch, prompts=batch.prompts.replace(dropped, batch.empty))
        fit = FlowFit(self.schedule, self.recipe.losses.tau_range)
        loss = fit(self.roles.score, batch.latents, batch.prompts, draws)
        return Turn(loss, {"score/flow_matching": loss.detach()})
