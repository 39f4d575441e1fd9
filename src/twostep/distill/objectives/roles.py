"""The models of a distillation by role: teacher, score, fakes, first, second, critic.

A role is called like any velocity and knows which parameters it trains. It owns a full set of
weights, or is an adapter on a backbone that all roles share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twostep.distill.objectives.critic import Critic
from twostep.families.family import Prediction, PromptBatch
from twostep.models.adapters import AdapterVelocity, SharedBackbone
from twostep.models.velocity import Velocity

# A call whose result is differentiated costs about two forwards more.
_WITH_GRADIENT = 3


@dataclass
class Role:
    """A velocity in one role.

    Attributes:
        velocity: what is called.
        model: the network it runs on; its size and dtype, not to be called past the role.
        trained: holds what this role trains, as checkpoints do; None for a frozen role.
        linear_only: of it the linear layers' matrices alone are trained, the rest stays still.
        transformer: gives the role's weights as a diffusers transformer.
        lora: gives an adapter's as a LoRA file holds them; None for a full set.
        evaluations: forwards of one sample so far; those with a gradient count as three.
    """

    velocity: Velocity
    model: Any
    trained: nn.Module | None
    transformer: Callable[[], nn.Module]
    lora: Callable[[], dict[str, Tensor]] | None = None
    evaluations: int = 0
    linear_only: bool = False

    @staticmethod
    def full(
        model: Any,
        *,
        trainable: bool,
        velocity: Velocity | None = None,
        linear_only: bool = False,
    ) -> Role:
        """With a full set of weights of its own.

        Args:
            velocity: what is called in the model's place, such as a compiled one.
        """
        model.requires_grad_(trainable and not linear_only)
        if trainable and linear_only:
            for weight in _linear_weights(model):
                weight.requires_grad_(True)
        called = model if velocity is None else velocity  # a compiled module has no truth value
        trained = model if trainable else None
        return Role(called, model, trained, lambda: model, linear_only=linear_only)

    @staticmethod
    def adapter(backbone: SharedBackbone, name: str = "") -> Role:
        """An adapter on a shared backbone; without a name the frozen backbone alone."""
        velocity = AdapterVelocity(backbone, name)
        trained = backbone.module(name) if name else None
        lora = partial(backbone.lora, name) if name else None
        merged = partial(backbone.merged, name)
        return Role(velocity, backbone.model, trained, merged, lora=lora)

    def __call__(
        self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction:
        prediction = self.velocity(latents, sigma, prompts, taps)
        cost = _WITH_GRADIENT if prediction.velocity.requires_grad else 1
        self.evaluations += cost * len(latents)
        return prediction

    def parameters(self) -> list[nn.Parameter]:
        """What this role trains; empty for a frozen role."""
        if self.trained is None:
            return []
        if self.linear_only:
            return _linear_weights(self.trained)
        return list(self.trained.parameters())


def _linear_weights(model: nn.Module) -> list[nn.Parameter]:
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [module.get_parameter("weight") for module in linear]


@dataclass(frozen=True)
class Roles:
    """All roles of one distillation.

    Attributes:
        teacher: makes validation images and the critic's features; frozen.
        score: trusted at every noise level; frozen once it is fitted; may be the teacher itself.
        first, second: the student's steps; the same object when parameters are shared.
        fakes: follow the student's clean predictions: one for both steps, or one each.
        critic: on hidden states of the teacher, or of the score.
    """

    teacher: Role
    score: Role
    first: Role
    second: Role
    fakes: tuple[Role, ...]
    critic: Critic

    @property
    def shared(self) -> bool:
        return self.first is self.second

    def fake_of(self, step: int) -> Role:
        """The fake of step 0 or 1."""
        return self.fakes[min(step, len(self.fakes) - 1)]

    def student_parameters(self) -> list[nn.Parameter]:
        """The student's parameters, each once."""
        shared = [] if self.shared else self.second.parameters()
        return self.first.parameters() + shared

    def fake_parameters(self) -> list[nn.Parameter]:
        return [p for fake in self.fakes for p in fake.parameters()]

    def hold_score(self, still: bool = True) -> None:
        """A score that was fitted takes no gradient, though the critic's goes through it."""
        for parameter in self.score.parameters():
            if parameter.requires_grad == still:
                parameter.requires_grad_(not still)

    @torch.no_grad()
    def start_fakes(self) -> None:
        """Gives the fakes the weights of the score that was fitted, which has the same ones."""
        for fake in self.fakes:
            pairs = zip(fake.parameters(), self.score.parameters(), strict=True)
            for own, fitted in pairs:
                own.copy_(fitted)

    def by_name(self) -> dict[str, Role]:
        """Every role once; one that plays several parts under the first of their names."""
        named = {"teacher": self.teacher, "score": self.score}
        named |= {"first": self.first, "second": self.second}
        named |= {f"fake{index + 1}": fake for index, fake in enumerate(self.fakes)}
        once: dict[str, Role] = {}
        for name, role in named.items():
            if all(role is not other for other in once.values()):
                once[name] = role
        return once

    def trained_modules(self) -> dict[str, nn.Module]:
        """Every trained module by name, as a checkpoint holds them."""
        trained = {name: role.trained for name, role in self.by_name().items()}
        modules = {name: module for name, module in trained.items() if module is not None}
        return {**modules, "critic": self.critic.heads}

    @property
    def evaluations(self) -> int:
        """Of all roles."""
        return sum(role.evaluations for role in self.by_name().values())
