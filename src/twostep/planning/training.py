"""`twostep plan`: what a recipe needs, worked out before anything is loaded.

The project's own code runs, stage by stage, on tensors that have a shape, a type and a life, but no
memory. Bytes alive are counted as storages come and go, operations by torch's own formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from twostep.data.cache.spec import recipe_schedule
from twostep.distill.batches import divide_batch
from twostep.distill.objectives.build import build_roles
from twostep.distill.objectives.roles import Roles
from twostep.distill.objectives.turns import Objectives
from twostep.planning.checking import count_decoding, count_forward, count_validation
from twostep.planning.disk import cache_bytes, comfyui_host_bytes, pair_bytes, student_bytes
from twostep.planning.roles import fitting_bytes, plan_roles
from twostep.planning.run import RunStages, checkpoint_bytes
from twostep.planning.stages import Needs, Stage, TrainingPlan, largest
from twostep.planning.teaching import encoding_stage, sampling_stage
from twostep.planning.turns import Counted, count_turn, gathered_bytes, turns_of, turns_of_a_student
from twostep.planning.using import using_stages
from twostep.planning.weightless import (
    CPU,
    load_weightless,
    make_fake,
    open_weightless,
    random_batch,
)
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import Placement
from twostep.runtime.progress import progress_bar
from twostep.runtime.shape_tensors import ShapesOnly

# The CUDA context, cuBLAS workspaces and what the allocator cannot reuse; on a CPU the interpreter
# and its libraries.
_RESERVED_BYTES = {"cuda": 2 << 30, "cpu": 3 << 27}
# Told that one of the things to be counted is.
Advance = Callable[[int], None]


def plan(
    recipe: Recipe,
    processes: int = 1,
    memory_gib: float = 80.0,
    prompt_tokens: int = 128,
    tflops: float | None = None,
    disk_rate: float = 1.0,
    *,
    roles: Roles | None = None,
) -> TrainingPlan:
    """Works out what `recipe` needs at every stage.

    Args:
        processes: GPUs.
        memory_gib: of each.
        prompt_tokens: length of a caption, in tokens.
        tflops: achieved rate of each process, in 1e12 operations per second.
        disk_rate: in 1e9 bytes per second.
        roles: the recipe's on the meta device, if they were built already; they are used up.

    Raises:
        RecipeError, ModelError: for a recipe that cannot run.
    """
    memory = int(memory_gib * 2**30)
    folder = open_weightless(recipe.teacher.model)
    schedule = recipe_schedule(recipe, folder)
    cache, whole = cache_bytes(recipe, folder, prompt_tokens), student_bytes(folder)
    fitted, warmed = recipe.score.fit_turns > 0, recipe.losses.warmup_turns > 0
    counted = 2 + fitted + warmed + (recipe.training.joint_turns > 0) + 8
    with progress_bar("plan", counted) as advance:
        needs = measure(recipe, processes, prompt_tokens, roles=roles, advance=advance)
        with ShapesOnly():
            teaching = [encoding_stage(recipe, folder, prompt_tokens, disk=cache)]
            advance(1)
            teaching.append(sampling_stage(recipe, folder, schedule, prompt_tokens, disk=cache))
            advance(1)
            comfyui = comfyui_host_bytes(folder)
        others = [Stage("export: comfyui", 0, host=comfyui, disk=whole)]
        others += using_stages(recipe, prompt_tokens, _placement(recipe).dtype, advance=advance)
    seconds = None
    if tflops is not None:
        operations = sum(needs.flops[name] * n for name, n in needs.turns_of_a_student.items())
        seconds = 1000 * operations / (tflops * 1e12 * processes)
    stages = [*teaching, *needs.stages, *others]
    advice: list[str] = []
    if largest(stages) + needs.reserved > memory:
        advice.extend(
            _advice(recipe, processes, prompt_tokens, memory, least=largest(teaching + others))
        )
    return TrainingPlan(
        **vars(needs) | {"stages": stages},
        cache=cache,
        student=whole if needs.pair is None else needs.pair,
        processes=processes,
        memory=memory,
        seconds_per_1000_turns=seconds,
        seconds_per_checkpoint=needs.checkpoint / (disk_rate * 1e9),
        advice=advice,
    )


def measure(
    recipe: Recipe,
    processes: int,
    prompt_tokens: int,
    *,
    roles: Roles | None = None,
    advance: Advance = lambda _: None,
) -> Needs:
    """Builds the roles without weights, runs their turns and what comes due between them."""
    folder = open_weightless(recipe.teacher.model)
    recipe, rows = _as_counted(recipe, processes)
    settings = recipe.training
    if roles is None:
        with torch.device("meta"):
            roles = build_roles(recipe, folder, device=CPU, load=load_weightless)
    shards = 1
    if recipe.distributed.sharding == "shard":
        # Beyond one machine, of 8, weights are gathered within it.
        shards = recipe.distributed.shard_size or min(processes, 8)
    held = plan_roles(recipe, roles, shards)
    schedule = recipe_schedule(recipe, folder)
    sizes, size = recipe.data.sizes, (recipe.data.height, recipe.data.width)
    with ShapesOnly():
        # Sharded weights are gathered in the type they compute in, and not cast once more.
        gathered_dtype = torch.bfloat16 if shards > 1 and settings.autocast else None
        for role in roles.by_name().values():
            make_fake(role.model, gathered_dtype)
        make_fake(roles.critic.heads)
        batch = random_batch(recipe, folder, rows=rows, prompt_tokens=prompt_tokens)
        objectives = Objectives.build(recipe, roles, schedule)
        runs: dict[str, Counted] = {}
        for name, turn in turns_of(recipe, objectives).items():
            runs[name] = count_turn(turn, roles, batch, recipe, alternates=name == "joint")
            advance(1)
        largest_size = max(sizes, key=lambda s: s[0] * s[1])
        forward = count_forward(
            recipe, folder, roles, size=largest_size, prompt_tokens=prompt_tokens
        )
        validation = count_validation(
            recipe, folder, roles, schedule=schedule, prompt_tokens=prompt_tokens
        )
        advance(1)
        shown = min(settings.sample_prompts, settings.validation_samples)
        decoder, decoding = count_decoding(folder, size, shown, _placement(recipe))
        advance(1)
    gathered = gathered_bytes(roles) if shards > 1 else 0
    fitting = fitting_bytes(recipe, roles, shards) if recipe.score.fit_turns else 0
    checkpoint = checkpoint_bytes(held, roles, shards)
    adapters = recipe.student.weights == "lora" and not recipe.teacher.loras
    pair = pair_bytes(held) if adapters else None
    run = RunStages(
        recipe,
        held,
        extra=decoder + gathered,
        fitting=fitting,
        checkpoint=checkpoint,
        frozen=4 * sum(p.numel() for p in roles.score.parameters()),
        pair=pair,
    )
    stages = [
        *run.turns(runs),
        *run.checks(validation, decoding),
        run.save(processes),
        run.end(folder),
    ]
    return Needs(
        roles=held,
        activations={name: found.peak + gathered for name, found in runs.items()},
        flops={n: run.operations * (settings.batch_size // rows) for n, run in runs.items()},
        forwards={n: run.operations / rows / forward.operations for n, run in runs.items()},
        turns_of_a_student=turns_of_a_student(recipe),
        stages=stages,
        reserved=_RESERVED_BYTES[_device_type(recipe)],
        checkpoint=checkpoint,
        pair=pair,
        micro_batch=rows,
    )


def _as_counted(recipe: Recipe, processes: int) -> tuple[Recipe, int]:
    """The recipe as it can be run without weights, and the samples of a micro-batch."""
    # Counted as it is written: a compiler would only see shapes.
    settings = recipe.training.model_copy(update={"compile": False})
    _, rows = divide_batch(
        settings.batch_size, processes=processes, micro_batch=settings.micro_batch
    )
    changes: dict[str, Any] = {"training": settings}
    if recipe.score.model is not None:
        score = str(open_weightless(recipe.score.model).path)
        changes["score"] = recipe.score.model_copy(update={"model": score})
    return recipe.model_copy(update=changes), rows


def _device_type(recipe: Recipe) -> str:
    """A plan is for a GPU, unless the recipe says otherwise."""
    return "cpu" if recipe.training.device == "cpu" else "cuda"


def _placement(recipe: Recipe) -> Placement:
    on_cpu = _device_type(recipe) == "cpu"
    return Placement(CPU, torch.float32 if on_cpu else torch.bfloat16)


def _advice(
    recipe: Recipe, processes: int, prompt_tokens: int, memory: int, *, least: int
) -> Iterator[str]:
    """Settings that would make it fit, one at a time and then all together.

    Args:
        least: bytes of the stages that none of them changes.
    """
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
        needs = measure(recipe, processes, prompt_tokens)
        peak = max(needs.peak, least + needs.reserved)
        if peak <= memory:
            yield f"{' '.join(applied)} would fit: {peak / 2**30:.1f} GiB"
            return
    yield "no setting of this recipe makes it fit: fewer pixels, or more memory"


def _with(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    sections = {
        name: getattr(recipe, name).model_copy(update=values) for name, values in changes.items()
    }
    return recipe.model_copy(update=sections)
