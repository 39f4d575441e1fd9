"""One update: gradients of this process's rows, averaged, clipped, and taken if they are finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twostep.distill.batches import Batches
from twostep.distill.checkpoint import Progress, TrainingState
from twostep.distill.objectives.batch import Batch, Turn
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.roles import Roles
from twostep.errors import RecipeError, UserError
from twostep.recipe.schema import Recipe
from twostep.runtime.distributed import World, gathered


class TrainingStopped(UserError):
    """Training cannot go on; the message says why."""

    exit_code = 1


# What to lower where an update of a kind is refused.
_RATE_OF = {
    "score": "score.learning_rate",
    "critic": "fake.learning_rate or critic.learning_rate",
}


@dataclass(frozen=True)
class Gradients:
    """How a batch's gradients come about, the same for every update of a run.

    Attributes:
        rows: this process's parts of a batch.
        computing: the context of every forward.
    """

    recipe: Recipe
    batches: Batches
    rows: Sequence[slice]
    world: World
    device: torch.device
    computing: Callable[[], AbstractContextManager[None]]

    def __post_init__(self) -> None:
        """Raises RecipeError if processes that share weights would not run the same forwards."""
        recipe, own = self.recipe, sum(rows.stop - rows.start for rows in self.rows)
        alternate = recipe.training.joint_turns and recipe.critic.paired
        if alternate and recipe.distributed.sharding == "shard" and own % 2:
            raise RecipeError(
                f"training.batch_size: {recipe.training.batch_size} gives each of "
                f"{self.world.size} processes {own} samples; with training.joint_turns, "
                "critic.paired and distributed.sharding: shard it must be an even number"
            )

    def __call__(
        self, compute: Callable[[Batch, Draws], Turn], number: int, *, purpose: str
    ) -> dict[str, Tensor]:
        """Adds up the gradients of this process's rows; `loss` and its terms, of the whole batch.

        Empty if there is nothing to learn.
        """
        total: dict[str, Tensor] = {}
        settings = self.recipe.training
        for rows in self.rows:
            batch = self.batches.read(number, purpose, rows)
            draws = Draws(settings.seed, number, purpose, device=self.device, rows=rows)
            with self.computing():
                turn = compute(batch, draws)
            if not turn.terms:
                return {}
            loss, share = turn.loss.detach(), 1 / len(self.rows)
            terms = turn.backward(share, self.computing)
            for key, value in {"loss": loss, **terms}.items():
                part = value * share
                total[key] = total[key] + part if key in total else part
        return self.world.mean(total)


@dataclass(frozen=True)
class Update:
    """A step of the optimizers that learn from one kind of turn.

    Attributes:
        purpose: of its random numbers, and of the order in which it reads the cache.
        optimizers, parameters: by name.
        watched: parameters whose gradient's norm is worth a record, by name.
    """

    gradients: Gradients
    progress: Progress
    purpose: str
    optimizers: Mapping[str, torch.optim.Optimizer]
    parameters: Mapping[str, list[nn.Parameter]]
    watched: Mapping[str, list[nn.Parameter]]

    def __call__(
        self, compute: Callable[[Batch, Draws], Turn], number: int
    ) -> tuple[dict[str, Tensor], bool]:
        """The terms of batch `number`, and whether the step was taken.

        Raises:
            TrainingStopped: if too many in a row were not finite.
        """
        self.zero()
        terms = self.gradients(compute, number, purpose=self.purpose)
        if not terms:
            return {}, False
        for parameters in self.parameters.values():
            self.gradients.world.average_gradients(parameters)
        norms = {f"gradient_norm/{name}": _norm(own) for name, own in self.watched.items()}
        limit = self.gradients.recipe.training.max_gradient_norm
        totals = [
            gathered(nn.utils.clip_grad_norm_(own, limit)) for own in self.parameters.values()
        ]
        accepted = self._accept(terms["loss"], *totals)
        if accepted:
            for optimizer in self.optimizers.values():
                optimizer.step()
        return {**terms, **norms}, accepted

    def zero(self) -> None:
        """Lets the gradients go."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """The learning rate of each optimizer, by name."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]

    def _accept(self, *values: Tensor) -> bool:
        """Whether a step may be taken; counts the refused ones and gives up after too many."""
        accepted = bool(torch.stack([v.detach() for v in values]).isfinite().all())
        note_finite(
            self.progress,
            self.purpose,
            accepted=accepted,
            limit=self.gradients.recipe.training.max_non_finite,
        )
        return accepted


def note_finite(progress: Progress, kind: str, *, accepted: bool, limit: int) -> None:
    """Counts an update, or a validation, by whether all of it was finite.

    Raises:
        TrainingStopped: if more than `limit` of this kind in a row were not.
    """
    in_a_row = progress.count(kind, accepted=accepted)
    if in_a_row > limit:
        what = "its images were" if kind == "validation" else "loss or gradient was"
        raise TrainingStopped(
            f"turn {progress.turn}, {kind}: {what} not finite {in_a_row} times in a row "
            f"(training.max_non_finite is {limit}). No step was taken with them; begin a new run "
            f"with a lower {_RATE_OF.get(kind, 'training.learning_rate')}"
        )


def build_updates(roles: Roles, state: TrainingState, gradients: Gradients) -> dict[str, Update]:
    """By what they learn: critic, student, joint (both at once), and score where one is fitted."""
    watched = {"first": roles.first.parameters()}
    if not roles.shared:
        watched["second"] = roles.second.parameters()
    student = {"student": roles.student_parameters()}
    critic = {"fake": roles.fake_parameters(), "critic": list(roles.critic.heads.parameters())}
    learning = {
        "critic": ("critic", critic),
        "student": ("student", student),
        "joint": ("student", student | critic),
    }
    if gradients.recipe.score.fit_turns:
        learning["score"] = ("score", {"score": roles.score.parameters()})
    return {
        name: Update(
            gradients,
            state.progress,
            purpose=purpose,
            optimizers={part: state.optimizers[part] for part in parameters},
            parameters=parameters,
            watched=watched if "student" in parameters else {},
        )
        for name, (purpose, parameters) in learning.items()
    }


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return gathered(nn.utils.get_total_norm(gradients))
