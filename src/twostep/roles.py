"""The models of a distillation by role: teacher, score, fakes, first, second, critic.

A role is called like a velocity field and knows which parameters it trains. It owns a full set of
weights (`FullRole`) or is an adapter on a backbone that all roles share (`adapters.py`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from twostep.adapters import AdapterRole, SharedBackbone
from twostep.backbones.model import load_velocity, read_index, resolve
from twostep.backbones.zimage import Prediction, PromptBatch, ZImageVelocity
from twostep.config import Recipe, RecipeError
from twostep.critic import CriticHeads
from twostep.rollout import VelocityField


class Role(Protocol):
    """A velocity model in one role.

    Attributes:
        model: the network it runs on; its size and dtype, not to be called past the role.
    """

    model: ZImageVelocity

    def __call__(
        self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction: ...

    def parameters(self) -> list[nn.Parameter]:
        """What this role trains; empty for a frozen role."""
        ...

    def trained_module(self) -> nn.Module:
        """What a checkpoint holds of this role."""
        ...

    def transformer(self) -> nn.Module:
        """The role's weights as a diffusers transformer."""
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

    def trained_module(self) -> nn.Module:
        return self.model

    def transformer(self) -> nn.Module:
        transformer: nn.Module = self.model.transformer
        return transformer


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

    teacher: Role
    score: Role
    first: Role
    second: Role
    fakes: tuple[Role, ...]
    critic: CriticHeads

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

    def trained_modules(self) -> dict[str, nn.Module]:
        """Every trained module by name, as a checkpoint holds them."""
        modules: dict[str, nn.Module] = {"first": self.first.trained_module()}
        if not self.shared:
            modules["second"] = self.second.trained_module()
        for index, fake in enumerate(self.fakes):
            modules[f"fake{index + 1}"] = fake.trained_module()
        modules["critic"] = self.critic
        return modules


def build_roles(recipe: Recipe, device: torch.device) -> Roles:
    """Loads the teacher and makes every other role from it.

    Student and fakes start from the teacher's weights, in fp32, unless the recipe names a student
    to start from; the score is the teacher unless it names another model.

    Raises:
        ModelError: for a model folder that cannot be used.
        RecipeError: if a critic layer does not exist, or `student.init` does not fit.
    """
    compiled = recipe.training.compile
    teacher_model = load_velocity(resolve(recipe.teacher.model))
    layers = recipe.critic.layers
    if not layers or max(layers) >= teacher_model.depth or sorted(set(layers)) != list(layers):
        raise RecipeError(
            f"critic.layers: expected ascending layers in 0..{teacher_model.depth - 1}, "
            f"got {list(layers)}"
        )

    names = ["first"] if recipe.student.sharing == "shared" else ["first", "second"]
    fake_names = ["fake1", "fake2"] if recipe.fake.models == "per_step" else ["fake1"]
    teacher, trained = (_adapters if recipe.student.parameters == "lora" else _full_sets)(
        recipe, teacher_model.to(device), [*names, *fake_names]
    )
    first, second = trained[names[0]], trained[names[-1]]
    if recipe.student.init is not None:
        _start_from(resolve(recipe.student.init), first, second)
    fakes = tuple(trained[name] for name in fake_names)
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


def _full_sets(
    recipe: Recipe, model: ZImageVelocity, names: list[str]
) -> tuple[Role, dict[str, Role]]:
    settings = recipe.training
    trained: dict[str, Role] = {}
    for name in names:
        own = copy.deepcopy(model)
        if settings.checkpoint_activations:
            own.enable_gradient_checkpointing()
        trained[name] = FullRole(own, True, settings.compile)
    return FullRole(model, False, settings.compile), trained


def _adapters(
    recipe: Recipe, model: ZImageVelocity, names: list[str]
) -> tuple[Role, dict[str, Role]]:
    student, settings = recipe.student, recipe.training
    model.to(getattr(torch, student.backbone_dtype))
    backbone = SharedBackbone(model, names, student.rank, student.target_modules, settings.seed)
    if settings.checkpoint_activations:
        backbone.checkpoint_activations()
    trained: dict[str, Role] = {name: AdapterRole(backbone, name) for name in names}
    return AdapterRole(backbone), trained


@torch.no_grad()
def _start_from(folder: Path, first: Role, second: Role) -> None:
    """Gives the steps the weights of another student."""
    if "transformer_2" not in read_index(folder):
        raise RecipeError(f"student.init: {folder} is no two-step student")
    found = [load_velocity(folder, part) for part in ("transformer", "transformer_2")]
    if first is second and not _same(*found):
        raise RecipeError(
            f"student.init: the two steps of {folder} differ, student.parameters: shared needs "
            "them equal"
        )
    for role, model in zip((first, second), found, strict=True):
        try:
            role.model.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise RecipeError(f"student.init: {folder} is no student of this teacher") from error


def _same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def _load_score(folder: Path, teacher: ZImageVelocity, device: torch.device) -> ZImageVelocity:
    model = load_velocity(folder)
    ours, theirs = teacher.channels, model.channels
    if ours != theirs:
        raise RecipeError(f"score.model: has {theirs} latent channels, the teacher has {ours}")
    return model.to(device)
