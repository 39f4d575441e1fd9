"""The student's turn and the critic's as one: what each learns from, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runs import assert_same_run
from twostep.data.cache.build import open_cache
from twostep.distill.objectives.draws import Draws
from twostep.distill.trainer import Trainer
from twostep.distill.update import Gradients
from twostep.errors import RecipeError
from twostep.method import losses
from twostep.method.flow import add_noise
from twostep.recipe.schema import Recipe
from twostep.runtime.distributed import World

Make = Callable[..., Recipe]
CPU = torch.device("cpu")
JOINT: dict[str, Any] = {
    "score": {"fit_turns": 1},
    "critic": {"network": "score", "one_look": True},
    "losses": {"warmup_turns": 0},
    "training": {"joint_turns": True},
}


def trainer_of(recipe: Recipe) -> Trainer:
    return Trainer(recipe, open_cache(recipe))


def draws() -> Draws:
    return Draws(0, 0, "student", device=CPU)


def gradients(trainer: Trainer) -> dict[str, list[Tensor]]:
    modules = trainer.state.modules
    found = {n: [p.grad for p in m.parameters() if p.grad is not None] for n, m in modules.items()}
    for module in modules.values():
        module.zero_grad()
    return found


def test_the_student_learns_what_it_learns_alone(make_recipe: Make) -> None:
    critic = JOINT["critic"] | {"paired": False}
    trainer = trainer_of(make_recipe(**(JOINT | {"critic": critic})))
    batch = trainer.learner.batches.read(0, "student")
    trainer.learner.objectives.student(batch, draws()).backward()
    alone = gradients(trainer)
    # Neither the critic's heads nor the score learn from what the student is told.
    assert not alone["critic"]
    assert not alone["score"]
    trainer.learner.objectives.joint(batch, draws()).backward()
    together = gradients(trainer)
    for name in ("first", "second"):
        pairs = zip(alone[name], together[name], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not together["score"]
    assert together["fake1"]
    assert together["fake2"]


def test_heads_learn_to_tell_the_reals_from_the_students_own_samples(make_recipe: Make) -> None:
    """Worked out here from the rollout: reals and both steps, re-noised alike."""
    critic = JOINT["critic"] | {"paired": False}
    trainer = trainer_of(make_recipe(**(JOINT | {"critic": critic})))
    batch, roles = trainer.learner.batches.read(0, "student"), trainer.roles
    trainer.learner.objectives.joint(batch, draws()).backward()
    found = gradients(trainer)["critic"]

    numbers = draws()
    noise = numbers.normal_like(batch.noise)
    with torch.no_grad():
        rollout = trainer.learner.objectives.student.rollout(noise, batch.prompts, numbers)
    tau = numbers.sigma(len(noise), trainer.cache.spec.schedule, trainer.recipe.critic.tau_range)
    other = numbers.normal_like(noise)

    def logits(clean: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = roles.score(add_noise(clean, other, tau), tau, batch.prompts, (0, 1)).hidden
        result: Tensor = roles.critic.heads(hidden, 4, 4)
        return result

    for clean in (rollout.clean1, rollout.clean2):
        losses.critic_adversarial(logits(batch.reals), logits(clean)).backward()
    for ours, expected in zip(found, gradients(trainer)["critic"], strict=True):
        torch.testing.assert_close(ours, expected)


def test_half_of_the_rows_are_paired_and_the_fakes_learn_from_the_others(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_recipe(**JOINT))
    batch, seen, followed = trainer.learner.batches.read(0, "student"), [], []
    student, critic = trainer.learner.objectives.student, trainer.learner.objectives.critic
    rollout, fit = student.rollout, critic._fit["final"]

    def spy(noise: Tensor, *rest: Any) -> Any:
        seen.append((noise, rollout(noise, *rest)))
        return seen[-1][1]

    def spy_fit(velocity: Any, clean: Tensor, *rest: Any) -> Any:
        followed.append(clean)
        return fit(velocity, clean, *rest)

    monkeypatch.setattr(student, "rollout", spy)
    monkeypatch.setattr(critic, "_fit", dict.fromkeys(critic._fit, spy_fit))
    trainer.learner.objectives.joint(batch, draws()).backward()
    ((noise, made),) = seen
    assert torch.equal(noise[::2], batch.noise[::2])
    assert not any(torch.equal(a, b) for a, b in zip(noise[1::2], batch.noise[1::2], strict=True))
    assert torch.equal(followed[0], made.clean1[1::2])
    assert torch.equal(followed[1], made.clean2[1::2])


def test_samples_that_cannot_be_halved_are_named(make_recipe: Make) -> None:
    joint = {"joint_turns": True}
    with pytest.raises(RecipeError, match="batch_size must be even with training"):
        make_recipe(training=joint | {"batch_size": 5})
    recipe = make_recipe(training=joint, distributed={"sharding": "shard"})
    one_each = {"batches": None, "device": CPU, "computing": nullcontext}
    world = World(CPU)
    world.size = 4
    with pytest.raises(RecipeError, match="4 gives each of 4 processes 1 samples"):
        Gradients(recipe, rows=[slice(2, 3)], world=world, **one_each)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2])
def test_a_joint_run_in_parts_equals_the_whole(
    make_recipe: Make, tiny_folder: Path, size: int
) -> None:
    whole, parts = (
        make_recipe(name, **(JOINT | {"training": JOINT["training"] | training}))
        for name, training in (("whole", {}), ("parts", {"micro_batch": size}))
    )
    for recipe in (whole, parts):
        trainer_of(recipe).train()
    assert_same_run(whole, parts, tiny_folder)
