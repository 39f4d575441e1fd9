"""What each role of a training holds between the turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from twostep.distill.objectives.roles import Roles
from twostep.distill.optimizers import state_numbers
from twostep.recipe.schema import Recipe


@dataclass(frozen=True)
class RolePlan:
    """Bytes of one role on one process, while the student is trained."""

    name: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average


def plan_roles(recipe: Recipe, roles: Roles, shards: int) -> list[RolePlan]:
    """Every role once; what several of them share stands with the first."""
    seen: set[int] = set()
    result = []
    for name, role in roles.by_name().items():
        trained = {id(p) for p in role.parameters()}
        # Buffers: packed weights.
        held = chain(role.model.parameters(), role.model.buffers())
        own = [p for p in held if id(p) not in seen]
        if recipe.student.weights == "lora" and trained:
            own = [p for p in own if id(p) in trained]
        elif recipe.student.weights == "lora":
            own = [p for p in own if not p.requires_grad]
        seen.update(id(p) for p in own)
        if name == "score":
            # Its gradients and optimizer states are gone before the student's are there.
            trained = set()
        averaged = name in ("first", "second")
        result.append(
            role_plan(recipe, name, own, trained=trained, averaged=averaged, shards=shards)
        )
    critic = list(roles.critic.heads.parameters())
    result.append(role_plan(recipe, "critic", critic, trained={id(p) for p in critic}))
    return result


def role_plan(
    recipe: Recipe,
    name: str,
    own: Sequence[Tensor],
    *,
    trained: set[int],
    averaged: bool = False,
    shards: int = 1,
) -> RolePlan:
    """One role of the tensors `own`, of which those with an id in `trained` learn."""
    optimizer = recipe.training.optimizer
    learning = [p for p in own if id(p) in trained]
    learnt = sum(p.numel() for p in learning)
    return RolePlan(
        name=name,
        parameters=sum(p.numel() for p in own),
        weights=sum(p.numel() * p.element_size() for p in own) // shards,
        gradients=4 * learnt // shards,
        optimizer=4 * sum(state_numbers(p, optimizer) for p in learning) // shards,
        average=4 * learnt * averaged // shards,
    )


def fitting_bytes(recipe: Recipe, roles: Roles, shards: int) -> int:
    """Gradients and optimizer states of the score while it is fitted."""
    fitted = roles.score.parameters()
    plan = role_plan(recipe, "score", fitted, trained={id(p) for p in fitted}, shards=shards)
    return plan.gradients + plan.optimizer
