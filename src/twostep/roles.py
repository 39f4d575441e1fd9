"""The models of a distillation by role: teacher, score, fakes, first, second, critic.

A role is called like a velocity field and knows which parameters it trains. Here each trainable
role owns a full set of weights; adapters on one shared backbone will be another kind of `Role`,
and nothing that uses roles will change.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from twostep.backbones.model import load_velocity, resolve
from twostep.backbones.zimage import Prediction, PromptBatch, ZImageVelocity
from twostep.config import Recipe, RecipeError
from twostep.critic import CriticHeads
from twostep.rollout import VelocityField


class Role(Protocol):
    """A velocity model in one role."""

    def __call__(
        self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction: ...

    def parameters(self) -> list[nn.Parameter]:
        """What this role trains; empty for a frozen role."""
        ...


class FullRole:
    """A role with a full set of weights of its own."""

    def __init__(self, model: ZImageVelocity, trainable: bool, compiled: bool = False) -> None:
        self.model = model.requires_grad_(trainable)
        self._forward = torch.compile(model, fullgraph=True) if compiled else model

    def __call__(
        self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction:
        return self._forward(latents, sigma, prompts, taps)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def bind_role(role: Role, prompts: PromptBatch) -> VelocityField:
    """`role` with its prompts fixed."""
    return lambda latents, sigma: role(latents, sigma, prompts).velocity


@dataclass(frozen=True)
class Roles:
    """All roles of one distillation.

    Attributes:
        teacher: makes validation images and the critic's features; frozen.
        score: trusted at every noise level; frozen; may be the teacher itself.
        first, second: the student's steps; the same object when parameters are shared.
        fakes: follow the student's clean predictions: one for both steps, or one each.
        critic: heads on the teacher's hidden states.
    """

    teacher: FullRole
    score: FullRole
    first: FullRole
    second: FullRole
    fakes: tuple[FullRole, ...]
    critic: CriticHeads

    @property
    def shared(self) -> bool:
        return self.first is self.second

    def fake_of(self, step: int) -> FullRole:
        """The fake of step 0 or 1."""
        return self.fakes[min(step, len(self.fakes) - 1)]

    def student_parameters(self) -> list[nn.Parameter]:
        """The student's parameters, each once."""
        shared = [] if self.shared else self.second.parameters()
        return self.first.parameters() + shared

    def fake_parameters(self) -> list[nn.Parameter]:
        return [p for fake in self.fakes for p in fake.parameters()]

    def trained_modules(self) -> dict[str, nn.Module]:
        """Every trained module by name, as a checkpoint holds them."""
        modules: dict[str, nn.Module] = {"first": self.first.model}
        if not self.shared:
            modules["second"] = self.second.model
        for index, fake in enumerate(self.fakes):
            modules[f"fake{index + 1}"] = fake.model
        modules["critic"] = self.critic
        return modules


def build_roles(recipe: Recipe, device: torch.device) -> Roles:
    """Loads the teacher and makes every other role from it.

    Student and fakes start from the teacher's weights, in fp32; the score is the teacher unless
    the recipe names another model.

    Raises:
        ModelError: for a model folder that cannot be used.
        RecipeError: if a critic layer does not exist.
    """
    compiled = recipe.training.compile
    teacher_model = load_velocity(resolve(recipe.teacher.model))
    layers = recipe.critic.layers
    if not layers or max(layers) >= teacher_model.depth or sorted(set(layers)) != list(layers):
        raise RecipeError(
            f"critic.layers: expected ascending layers in 0..{teacher_model.depth - 1}, "
            f"got {list(layers)}"
        )

    def trainable() -> FullRole:
        return FullRole(copy.deepcopy(teacher_model).to(device), True, compiled)

    first = trainable()
    second = trainable() if recipe.student.parameters == "decoupled" else first
    fakes = tuple(trainable() for _ in range(2 if recipe.fake.models == "per_step" else 1))
    teacher = FullRole(teacher_model.to(device), False, compiled)
    score = teacher
    if recipe.score.model is not None:
        score = FullRole(
            _load_score(resolve(recipe.score.model), teacher_model, device), False, compiled
        )
    # The heads are drawn from the recipe's seed, whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        critic = CriticHeads(teacher_model.width, len(layers), recipe.critic.width).to(device)
    return Roles(teacher, score, first, second, fakes, critic)


def _load_score(folder: Path, teacher: ZImageVelocity, device: torch.device) -> ZImageVelocity:
    model = load_velocity(folder)
    ours, theirs = teacher.channels, model.channels
    if ours != theirs:
        raise RecipeError(f"score.model: has {theirs} latent channels, the teacher has {ours}")
    return model.to(device)
