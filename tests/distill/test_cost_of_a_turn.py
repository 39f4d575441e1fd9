"""What a turn costs, counted by hooks on the network's main layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from twostep.data.cache.build import open_cache
from twostep.distill.objectives.draws import Draws
from twostep.distill.trainer import Trainer
from twostep.recipe.schema import Recipe

CPU = torch.device("cpu")
LORA = {"weights": "lora", "rank": 2, "backbone_dtype": "float32"}


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Samples that go through a main layer, forwards, again for the backward pass, and back."""
    seen: list[int] = []

    def forward(_: Any, inputs: tuple[Any, ...]) -> None:
        seen.append(len(inputs[0]))

    def backward(_: Any, __: Any, gradients: tuple[Any, ...]) -> None:
        seen.append(len(gradients[0]))

    # Before, since recomputation ends in the middle of a layer once it has what it needs.
    hooks = [layer.register_forward_pre_hook(forward) for layer in model.layers]
    hooks += [layer.register_full_backward_hook(backward) for layer in model.layers]
    yield seen
    for hook in hooks:
        hook.remove()


def cost(recipe: Recipe, *names: str) -> float:
    """Of the named turns, in forwards a sample; a backward of frozen weights is as dear as one."""
    trainer = Trainer(recipe, open_cache(recipe))
    batch, model = trainer.learner.batches.read(0, "student"), trainer.roles.teacher.model
    with counted(model) as seen:
        for name in names:
            getattr(trainer.learner.objectives, name)(
                batch, Draws(0, 0, "student", device=CPU)
            ).backward()
    return sum(seen) / len(batch.noise) / len(model.layers)


@pytest.mark.parametrize(
    ("critic", "joint", "share", "expected"),
    [
        # Student: 2 rollouts x 3, 2 x (score, fake, critic x 3). Critic: 2 + 2 rollouts, 2 fakes
        # x 3, 2 steps x (real, fake).
        ({}, False, 1.0, 16 + 14),
        ({"paired": False}, False, 1.0, 16 + 12),
        # One look: score and critic in one forward, reals once.
        ({"network": "score", "one_look": True}, False, 1.0, 14 + 13),
        # Joint: no rollout and no look of the critic's own, the fakes on half of the rows.
        ({"network": "score", "one_look": True, "paired": False}, True, 1.0, 14 + 6 + 1),
        ({"network": "score", "one_look": True}, True, 1.0, 14 + 3 + 1),
        ({"network": "score", "one_look": True}, True, 0.0, 10 + 2 + 1),
    ],
)
def test_forwards_of_a_turn(
    make_recipe: Callable[..., Recipe],
    critic: dict[str, Any],
    joint: bool,
    share: float,
    expected: float,
) -> None:
    recipe = make_recipe(
        student=LORA,
        score={"fit_turns": 1},
        # The last layer too: a backward pass from the critic goes through all of them.
        critic={"layers": [0, 2], **critic},
        losses={"warmup_turns": 0},
        training={
            "checkpoint_activations": True, "checkpoint_share": share, "joint_turns": joint,
        },
    )  # fmt: skip
    names = ("joint",) if joint else ("student", "critic")
    assert cost(recipe, *names) == expected
