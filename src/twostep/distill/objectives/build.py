"""Loads every role of a recipe, once what the recipe says of them is checked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from twostep.distill.objectives.critic import Critic
from twostep.distill.objectives.roles import Role, Roles
from twostep.errors import ModelError, RecipeError
from twostep.method.critic import CriticHeads
from twostep.models.adapters import SharedBackbone
from twostep.models.compiling import allow_graphs, compile_blocks
from twostep.models.folder import ModelFolder
from twostep.models.int8 import pack_int8
from twostep.models.student import STEPS
from twostep.models.velocity import Velocity
from twostep.recipe.schema import Recipe
from twostep.runtime.checksums import folder_fingerprint
from twostep.runtime.randomness import Stream, torch_seed

# (folder, part, dtype) -> the part's network, where it is to run
Load = Callable[[ModelFolder, str, torch.dtype], Any]
# A network's weights at the start: a folder and one of its transformers.
Start = tuple[ModelFolder, str]


def load_whole(device: torch.device) -> Load:
    """Whole networks, onto `device`."""

    def load(folder: ModelFolder, part: str, dtype: torch.dtype) -> Any:
        return folder.load(part, dtype).to(device)

    return load


def build_roles(
    recipe: Recipe, teacher: ModelFolder, *, device: torch.device, load: Load | None = None
) -> Roles:
    """Loads the teacher and every other role.

    Student and fakes start from the teacher's weights, in fp32, unless the recipe names a student
    to start from; the score is the teacher unless it names another model, and full sets of fakes
    then start from that.

    Args:
        load: how a network is loaded; whole and onto `device` if None.

    Raises:
        ModelError: for a model folder that cannot be used.
        RecipeError: if a critic layer does not exist, or `student.init` does not fit.
    """
    load = load or load_whole(device)
    score_folder = None if recipe.score.model is None else ModelFolder.open(recipe.score.model)
    starts = _starts(recipe, teacher, score_folder)
    _check_critic_layers(recipe, teacher)
    _check_score(teacher, score_folder)
    if recipe.student.weights == "lora":
        own, trained = _adapter_roles(recipe, teacher, load, list(starts))
    else:
        own, trained = _full_roles(recipe, teacher, load, starts)
    score = trained.get("score", own)
    if score_folder is not None and score is own:
        frozen = load(score_folder, "transformer", _frozen_dtype(recipe))
        if recipe.student.weights == "lora" and recipe.student.backbone_dtype == "int8":
            pack_int8(frozen)
        if recipe.training.checkpoint_activations:
            frozen.recompute_layers(recipe.training.checkpoint_share)
        score = _full(recipe, score_folder, frozen, trainable=False)
    heads = _heads(recipe, own.model.width)
    if device.type != "cpu":  # drawn on the CPU, so that every device has the same
        heads.to(device)
    first = trained["first"]
    return Roles(
        teacher=own,
        score=score,
        first=first,
        second=trained.get("second", first),
        fakes=tuple(role for name, role in trained.items() if name.startswith("fake")),
        critic=Critic(
            score if recipe.critic.network == "score" else own,
            heads,
            recipe.critic.layers,
            teacher.family.patch,
        ),
    )


def _frozen_dtype(recipe: Recipe) -> torch.dtype:
    """Of frozen weights as they are loaded: with adapters a score is as large as the backbone."""
    name = recipe.teacher.dtype
    if recipe.student.weights == "lora":
        name = "float32" if recipe.student.backbone_dtype == "float32" else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _heads(recipe: Recipe, width: int) -> CriticHeads:
    """Drawn from the recipe's seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(recipe.training.seed, Stream.HEADS))
        return CriticHeads(width, len(recipe.critic.layers), recipe.critic.width)


def _full_roles(
    recipe: Recipe, teacher: ModelFolder, load: Load, starts: dict[str, Start]
) -> tuple[Role, dict[str, Role]]:
    """The teacher's role, and the trained ones by name, each with weights of its own."""
    settings = recipe.training
    frozen = load(teacher, "transformer", _frozen_dtype(recipe))
    if settings.checkpoint_activations:
        # Frozen, but the critic's gradient goes through it.
        frozen.recompute_layers(settings.checkpoint_share)
    own = _full(recipe, teacher, frozen, trainable=False)
    trained = {}
    for name, (folder, part) in starts.items():
        model = load(folder, part, torch.float32)
        if settings.checkpoint_activations:
            model.recompute_layers(settings.checkpoint_share)
        linear = recipe.student.trained == "linear" and name in STEPS
        trained[name] = _full(recipe, folder, model, trainable=True, linear_only=linear)
    return own, trained


def _full(
    recipe: Recipe,
    folder: ModelFolder,
    model: Any,
    *,
    trainable: bool,
    linear_only: bool = False,
) -> Role:
    velocity: Velocity | None = None
    if recipe.training.compile and isinstance(model, FSDPModule):
        compile_blocks(folder.family.blocks(model))
    elif recipe.training.compile:
        allow_graphs()
        velocity = torch.compile(model, fullgraph=True)
    return Role.full(model, trainable=trainable, velocity=velocity, linear_only=linear_only)


def _adapter_roles(
    recipe: Recipe, teacher: ModelFolder, load: Load, names: list[str]
) -> tuple[Role, dict[str, Role]]:
    """The teacher's role, and the trained ones by name, all on one frozen backbone."""
    student, settings = recipe.student, recipe.training
    int8 = student.backbone_dtype == "int8"
    dtype = _frozen_dtype(recipe)
    backbone = SharedBackbone(
        load(teacher, "transformer", dtype),
        names,
        rank=student.rank,
        target_modules=student.target_modules,
        seed=settings.seed,
        original=partial(teacher.load, "transformer", dtype),
        int8=int8,
    )
    _start_adapters(recipe, backbone)
    if settings.compile:
        compile_blocks(teacher.family.blocks(backbone.model))
    if settings.checkpoint_activations:
        backbone.recompute_layers(settings.checkpoint_share)
    return Role.adapter(backbone), {name: Role.adapter(backbone, name) for name in names}


def _starts(recipe: Recipe, teacher: ModelFolder, score: ModelFolder | None) -> dict[str, Start]:
    """By trained role, the weights it starts from."""
    from_teacher = (teacher, "transformer")
    starts = {"first": from_teacher, "second": from_teacher}
    if recipe.student.init is not None and recipe.student.weights == "full":
        student = ModelFolder.open(recipe.student.init)
        starts = {"first": (student, "transformer"), "second": (student, "transformer_2")}
        _check_start(student, teacher, shared=recipe.student.steps == "shared")
    if recipe.student.steps == "shared":
        del starts["second"]
    names = ("fake1", "fake2") if recipe.fake.models == "per_step" else ("fake1",)
    # Where score and fake begin as one, the first differences are the student's.
    trusted = (score or teacher, "transformer")
    starts |= dict.fromkeys(names, trusted)
    if recipe.score.fit_turns:
        starts["score"] = trusted
    return starts


def _start_adapters(recipe: Recipe, backbone: SharedBackbone) -> None:
    """The student's adapters from two LoRA files, where the recipe names some."""
    if recipe.student.init is None:
        return
    student = ModelFolder.open(recipe.student.init)
    if student.kind != "lora_pair":
        raise RecipeError(
            f"student.init: {student.name} is no folder of two LoRA files, as student.weights: "
            "lora needs and such a run writes"
        )
    files = [student.path / f"{step}.safetensors" for step in STEPS]
    if recipe.student.steps == "shared" and len({f.read_bytes() for f in files}) > 1:
        raise RecipeError(
            f"student.init: the two steps of {student.name} differ, student.steps: shared "
            "needs them equal"
        )
    shared = recipe.student.steps == "shared"
    for name, file in zip(STEPS[: 2 - shared], files, strict=False):
        backbone.start(name, file)


def _check_start(student: ModelFolder, teacher: ModelFolder, *, shared: bool) -> None:
    try:
        student.check_full_student("student.init")
    except ModelError as error:
        raise RecipeError(str(error)) from error
    if student.architecture != teacher.architecture:
        raise RecipeError(f"student.init: {student.name} is no student of this teacher")
    if not shared:
        return
    first, second = (folder_fingerprint(student.base / part) for part in student.parts)
    if first != second:
        raise RecipeError(
            f"student.init: the two steps of {student.name} differ, student.steps: shared "
            "needs them equal"
        )


def _check_critic_layers(recipe: Recipe, teacher: ModelFolder) -> None:
    layers, depth = recipe.critic.layers, teacher.family.depth(teacher.architecture)
    if not layers or max(layers) >= depth or sorted(set(layers)) != list(layers):
        raise RecipeError(
            f"critic.layers: expected ascending layers in 0..{depth - 1}, got {list(layers)}"
        )


def _check_score(teacher: ModelFolder, score: ModelFolder | None) -> None:
    if score is not None:
        score.check_teacher("score.model")
    if score is not None and score.space.channels != teacher.space.channels:
        raise RecipeError(
            f"score.model: has {score.space.channels} latent channels, the teacher has "
            f"{teacher.space.channels}"
        )
