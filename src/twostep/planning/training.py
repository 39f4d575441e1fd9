"""`twostep plan`: what a recipe needs, worked out before anything is loaded.

The turns of the trainer itself run on fake tensors, which have a shape, a type and a life, but no
memory. Bytes alive are counted as storages come and go, operations by torch's own formulas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from twostep.data.cache.spec import recipe_schedule
from twostep.distill.batches import divide_batch
from twostep.distill.objectives.batch import Batch, Turn
from twostep.distill.objectives.build import build_roles
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.roles import Roles
from twostep.distill.objectives.turns import Objectives
from twostep.distill.optimizers import state_numbers
from twostep.planning.weightless import (
    CPU,
    cache_bytes,
    load_weightless,
    make_fake,
    open_weightless,
    random_batch,
)
from twostep.recipe.schema import Recipe
from twostep.runtime.memory_meter import gradients_dropped, live_bytes

# The CUDA context, cuBLAS workspaces and what the allocator cannot reuse.
_RESERVED_BYTES = 2 << 30


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


@dataclass(frozen=True)
class Needs:
    """What a recipe needs; bytes on each process.

    Attributes:
        activations: by turn, on pictures of the largest size: what comes alive at its peak beside
            what `roles` hold.
        flops: by turn, on the largest size: operations over the whole batch, of all processes.
        peak: of the largest turn, `roles` and the device's own needs included.
        cache, checkpoint: on disk.
    """

    roles: list[RolePlan]
    activations: dict[str, int]
    flops: dict[str, int]
    peak: int
    cache: int
    checkpoint: int
    micro_batch: int


@dataclass(frozen=True)
class TrainingPlan(Needs):
    """Needs against what there is.

    Attributes:
        memory: bytes of each process.
        seconds_per_1000_turns: the critic's turns included; None without a rate.
        advice: which settings would make it fit, where it does not.
    """

    processes: int
    memory: int
    seconds_per_1000_turns: float | None
    advice: list[str]

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory

    def as_json(self) -> str:
        return json.dumps(asdict(self) | {"fits": self.fits}, indent=1)


def plan(
    recipe: Recipe,
    processes: int = 1,
    memory_gib: float = 80.0,
    prompt_tokens: int = 128,
    tflops: float | None = None,
) -> TrainingPlan:
    """Works out what `recipe` needs.

    Args:
        processes: GPUs.
        memory_gib: of each.
        prompt_tokens: length of a caption, in tokens.
        tflops: achieved rate of each process, in 1e12 operations per second.

    Raises:
        RecipeError, ModelError: for a recipe that cannot run.
    """
    needs, memory = measure(recipe, processes, prompt_tokens), int(memory_gib * 2**30)
    seconds = None
    if tflops is not None:
        alone = recipe.training.critic_turns - recipe.training.joint_turns
        both = needs.flops["joint" if recipe.training.joint_turns else "student"]
        operations = both + alone * needs.flops["critic"]
        seconds = 1000 * operations / (tflops * 1e12 * processes)
    advice: list[str] = []
    if needs.peak > memory:
        advice.extend(_advice(recipe, processes, prompt_tokens, memory))
    return TrainingPlan(
        **vars(needs),
        processes=processes,
        memory=memory,
        seconds_per_1000_turns=seconds,
        advice=advice,
    )


def measure(recipe: Recipe, processes: int, prompt_tokens: int) -> Needs:
    """Builds the roles without weights and runs their turns."""
    folder = open_weightless(recipe.teacher.model)
    # Counted as it is written: a compiler would only see fake tensors.
    settings = recipe.training.model_copy(update={"compile": False})
    _, rows = divide_batch(
        settings.batch_size, processes=processes, micro_batch=settings.micro_batch
    )
    changes: dict[str, Any] = {"training": settings}
    if recipe.score.model is not None:
        score = str(open_weightless(recipe.score.model).path)
        changes["score"] = recipe.score.model_copy(update={"model": score})
    recipe = recipe.model_copy(update=changes)
    with torch.device("meta"):
        roles = build_roles(recipe, folder, device=CPU, load=load_weightless)
    shards = 1
    if recipe.distributed.sharding == "shard":
        shards = recipe.distributed.shard_size or processes
    held = _roles(recipe, roles, shards)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Sharded weights are gathered in the type they compute in, and not cast once more.
        gathered_dtype = torch.bfloat16 if shards > 1 and settings.autocast else None
        for role in roles.by_name().values():
            make_fake(role.model, gathered_dtype)
        make_fake(roles.critic.heads)
        objectives = Objectives.build(recipe, roles, recipe_schedule(recipe, folder))
        batch = random_batch(recipe, folder, rows=rows, prompt_tokens=prompt_tokens)
        turns: dict[str, Callable[[Batch, Draws], Turn]] = {
            "warm-up": objectives.student.warmup,
            "student": objectives.student,
            "critic": objectives.critic,
            "joint": objectives.joint,
        }
        if not settings.joint_turns:
            del turns["joint"]
        if not recipe.losses.warmup_turns:
            del turns["warm-up"]
        if recipe.score.fit_turns:
            turns["score"] = objectives.score
        runs = {name: _run(turn, roles, batch, recipe) for name, turn in turns.items()}
    gathered = _gathered_bytes(roles) if shards > 1 else 0
    activations = {name: found.peak + gathered for name, found in runs.items()}
    static = sum(role.total for role in held)
    trained = sum(r.parameters for r in held if r.gradients)
    averaged = sum(r.parameters for r in held if r.average)
    states = sum(r.optimizer * (1 if r.name == "critic" else shards) for r in held)
    return Needs(
        roles=held,
        activations=activations,
        flops={name: found.flops * (settings.batch_size // rows) for name, found in runs.items()},
        peak=static + max(activations.values()) + _RESERVED_BYTES,
        cache=cache_bytes(recipe, folder, prompt_tokens),
        checkpoint=4 * (trained + averaged) + states,
        micro_batch=rows,
    )


def _roles(recipe: Recipe, roles: Roles, shards: int) -> list[RolePlan]:
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
            _role_plan(recipe, name, own, trained=trained, averaged=averaged, shards=shards)
        )
    critic = list(roles.critic.heads.parameters())
    result.append(_role_plan(recipe, "critic", critic, trained={id(p) for p in critic}))
    return result


def _role_plan(
    recipe: Recipe,
    name: str,
    own: Sequence[Tensor],
    *,
    trained: set[int],
    averaged: bool = False,
    shards: int = 1,
) -> RolePlan:
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


def _gathered_bytes(roles: Roles) -> int:
    """With sharded weights: a block as it runs and the next, whole, and its gradients."""
    blocks = roles.teacher.model.layers
    return max(sum(p.numel() for p in block.parameters()) for block in blocks) * (2 * 2 + 4)


@dataclass(frozen=True)
class _Found:
    peak: int
    flops: int


def _run(
    turn: Callable[[Batch, Draws], Turn], roles: Roles, batch: Batch, recipe: Recipe
) -> _Found:
    """One turn forwards and backwards; bytes alive at the peak beside weights and gradients.

    All gradients are there when the second micro-batch begins, and sharded ones are reduced as
    they come: activations are counted without them, not less what they are at the end.
    """
    modules = roles.trained_modules().values()
    parameters = chain.from_iterable(module.parameters() for module in modules)
    with gradients_dropped(parameters), live_bytes() as live:
        autocast = recipe.training.autocast
        with torch.autocast("cpu", torch.bfloat16, autocast):
            found = turn(batch, Draws(0, 0, "student", device=CPU))
        found.backward()
    return _Found(live.peak, live.operations)


def _advice(recipe: Recipe, processes: int, prompt_tokens: int, memory: int) -> Iterator[str]:
    """Settings that would make it fit, one at a time and then all together."""
    own = recipe.training.batch_size // processes
    steps: list[tuple[str, dict[str, dict[str, Any]]]] = []
    if not recipe.training.checkpoint_activations:
        steps.append(
            ("training.checkpoint_activations=true", {"training": {"checkpoint_activations": True}})
        )
    if (recipe.training.micro_batch or own) > 1:
        steps.append(("training.micro_batch=1", {"training": {"micro_batch": 1}}))
    if recipe.student.weights != "lora":
        steps.append(("teacher.dtype=bfloat16", {"teacher": {"dtype": "bfloat16"}}))
        if processes > 1 and recipe.distributed.sharding == "replicate":
            steps.append(("distributed.sharding=shard", {"distributed": {"sharding": "shard"}}))
        lora = {"student": {"weights": "lora"}, "distributed": {"sharding": "replicate"}}
        steps.append(("student.weights=lora", lora))
    applied: list[str] = []
    for name, changes in steps:
        applied.append(name)
        recipe = _with(recipe, changes)
        peak = measure(recipe, processes, prompt_tokens).peak
        if peak <= memory:
            yield f"{' '.join(applied)} would fit: {peak / 2**30:.1f} GiB"
            return
    yield "no setting of this recipe makes it fit: fewer pixels, or more memory"


def _with(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    sections = {
        name: getattr(recipe, name).model_copy(update=values) for name, values in changes.items()
    }
    return recipe.model_copy(update=sections)
