"""The models of a distillation by role: teacher, score, fakes, first, second, critic.

A role is called like a velocity field and knows which parameters it trains. It owns a full set of
weights (`FullRole`) or is an adapter on a backbone that all roles share (`adapters.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from twostep.errors import RecipeError
from twostep.families.zimage import Prediction, PromptBatch, ZImageVelocity
from twostep.method.critic import CriticHeads
from twostep.method.rollout import VelocityField
from twostep.models.adapters import AdapterRole, SharedBackbone
from twostep.models.folder import (
    load_velocity,
    read_architecture,
    read_index,
    resolve,
)
from twostep.recipe.schema import (
    Recipe,
)
from twostep.runtime.devices import allow_graphs, compile_blocks
from twostep.runtime.files import folder_fingerprint


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
        self._forward = _compiled(model) if compiled else model

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


def _compiled(model: ZImageVelocity) -> Callable[..., Prediction]:
    if isinstance(model, FSDPModule):
        compile_blocks(model.transformer)
        return model
    allow_graphs()
    compiled: Callable[..., Prediction] = torch.compile(model, fullgraph=True, dynamic=False)
    return compiled


def bind_role(role: Role, prompts: PromptBatch) -> VelocityField:
    """`role` with its prompts fixed."""
    return lambda latents, sigma: role(latents, sigma, prompts).velocity


@dataclass(frozen=True)
class Roles:
    """All roles of one distillation.

    Attributes:
        teacher: makes validation images and the critic's features; frozen.
        score: trusted at every noise level; frozen once it is fitted; may be the teacher itself.
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
        modules = {n: r.trained_module() for n, r in self.by_name().items() if r.parameters()}
        return {**modules, "critic": self.critic}


# (folder, part, dtype) -> the part's transformer, where it is to run
Load = Callable[[Path, str, torch.dtype], ZImageVelocity]


def build_roles(recipe: Recipe, device: torch.device, load: Load | None = None) -> Roles:
    """Loads the teacher and every other role.

    Student and fakes start from the teacher's weights, in fp32, unless the recipe names a student
    to start from; the score is the teacher unless it names another model.

    Args:
        load: how a transformer is loaded; whole and onto `device` if None.

    Raises:
        ModelError: for a model folder that cannot be used.
        RecipeError: if a critic layer does not exist, or `student.init` does not fit.
    """

    def load_whole(folder: Path, part: str, dtype: torch.dtype) -> ZImageVelocity:
        return load_velocity(folder, part, dtype).to(device)

    load = load or load_whole
    folder = resolve(recipe.teacher.model)
    starts = _starts(recipe, folder)
    _check_critic_layers(recipe, folder)
    _check_score(recipe, folder)
    compiled, frozen_dtype = recipe.training.compile, getattr(torch, recipe.teacher.dtype)
    trained: dict[str, Role]
    if recipe.student.parameters == "lora":
        backbone = _backbone(recipe, folder, load, list(starts))
        teacher: Role = AdapterRole(backbone)
        trained = {name: AdapterRole(backbone, name) for name in starts}
    else:
        frozen = load(folder, "transformer", frozen_dtype)
        if recipe.training.checkpoint_activations:
            # Frozen, but the critic's gradient goes through it.
            frozen.enable_gradient_checkpointing(recipe.training.checkpoint_share)
        teacher = FullRole(frozen, False, compiled)
        trained = {}
        for name, (start, part) in starts.items():
            own = load(start, part, torch.float32)
            if recipe.training.checkpoint_activations:
                own.enable_gradient_checkpointing(recipe.training.checkpoint_share)
            trained[name] = FullRole(own, True, compiled)
    fakes = tuple(role for name, role in trained.items() if name.startswith("fake"))
    score = trained.get("score", teacher)
    if recipe.score.model is not None and score is teacher:
        model = load(resolve(recipe.score.model), "transformer", frozen_dtype)
        score = FullRole(model, False, compiled)
    # The heads are drawn from the recipe's seed, whatever was drawn before.
    layers, width = len(recipe.critic.layers), recipe.critic.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        critic = CriticHeads(teacher.model.width, layers, width)
    if device.type != "cpu":  # drawn on the CPU, so that every device has the same
        critic.to(device)
    first = trained["first"]
    return Roles(teacher, score, first, trained.get("second", first), fakes, critic)


def _starts(recipe: Recipe, teacher: Path) -> dict[str, tuple[Path, str]]:
    """By trained role, the folder and part whose weights it starts from."""
    from_teacher = (teacher, "transformer")
    starts = {"first": from_teacher, "second": from_teacher}
    if recipe.student.init is not None:
        folder = resolve(recipe.student.init)
        starts = {"first": (folder, "transformer"), "second": (folder, "transformer_2")}
        _check_start(folder, teacher, recipe.student.sharing == "shared")
    if recipe.student.sharing == "shared":
        del starts["second"]
    names = ("fake1", "fake2") if recipe.fake.models == "per_step" else ("fake1",)
    starts |= dict.fromkeys(names, from_teacher)
    if recipe.score.fit_turns:
        score = teacher if recipe.score.model is None else resolve(recipe.score.model)
        starts["score"] = (score, "transformer")
    return starts


def _check_start(folder: Path, teacher: Path, shared: bool) -> None:
    if "transformer_2" not in read_index(folder):
        raise RecipeError(f"student.init: {folder} is no two-step student")
    ours, theirs = (read_architecture(f) for f in (teacher, folder))
    if ours != theirs:
        raise RecipeError(f"student.init: {folder} is no student of this teacher")
    if not shared:
        return
    first, second = (folder_fingerprint(folder / p) for p in ("transformer", "transformer_2"))
    if first != second:
        raise RecipeError(
            f"student.init: the two steps of {folder} differ, student.parameters: shared needs "
            "them equal"
        )


def _check_critic_layers(recipe: Recipe, teacher: Path) -> None:
    layers, depth = recipe.critic.layers, int(read_architecture(teacher)["n_layers"])
    if not layers or max(layers) >= depth or sorted(set(layers)) != list(layers):
        raise RecipeError(
            f"critic.layers: expected ascending layers in 0..{depth - 1}, got {list(layers)}"
        )


def _backbone(recipe: Recipe, folder: Path, load: Load, names: list[str]) -> SharedBackbone:
    student, settings = recipe.student, recipe.training
    int8 = student.backbone_dtype == "int8"
    dtype = torch.bfloat16 if int8 else getattr(torch, student.backbone_dtype)

    def original() -> nn.Module:
        transformer: nn.Module = load_velocity(folder, "transformer", dtype).transformer
        return transformer

    backbone = SharedBackbone(
        load(folder, "transformer", dtype),
        names,
        student.rank,
        student.target_modules,
        settings.seed,
        original,
        int8,
    )
    if settings.compile:
        compile_blocks(backbone.model.transformer)
    if settings.checkpoint_activations:
        backbone.checkpoint_activations(settings.checkpoint_share)
    return backbone


def _check_score(recipe: Recipe, teacher: Path) -> None:
    if recipe.score.model is None:
        return
    folders = (teacher, resolve(recipe.score.model))
    ours, theirs = (int(read_architecture(folder)["in_channels"]) for folder in folders)
    if ours != theirs:
        raise RecipeError(f"score.model: has {theirs} latent channels, the teacher has {ours}")
