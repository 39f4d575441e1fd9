"""Whether a recipe can fit this machine's memory at all: a lower bound, in milliseconds.

`twostep plan` counts everything, in seconds to minutes. What is refused here cannot work.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

import torch

from twostep.distill.batches import divide_batch
from twostep.distill.objectives.roles import Roles
from twostep.errors import RecipeError
from twostep.models.folder import ModelFolder
from twostep.planning.roles import plan_roles
from twostep.recipe.schema import Recipe

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def machine_bytes(device: torch.device) -> int | None:
    """All the memory of a device, used or not; None if nobody can say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    found = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # "max" is no number
        found.append(int(_CGROUP.read_text()))
    return min(found, default=None)


def least_bytes(
    recipe: Recipe, folder: ModelFolder, roles: Roles, *, processes: int
) -> tuple[int, int]:
    """Of one process: what the roles hold between turns, and what a turn at least brings.

    A turn keeps a hidden state of every main layer for its backward, whatever is recomputed.
    """
    sharded = recipe.distributed.sharding == "shard"
    held = plan_roles(recipe, roles, (recipe.distributed.shard_size or processes) if sharded else 1)
    _, rows = divide_batch(
        recipe.training.batch_size, processes=processes, micro_batch=recipe.training.micro_batch
    )
    area = max(math.prod(folder.space.shape(*size)[1:]) for size in recipe.data.sizes)
    tokens = area // folder.space.patch**2
    model = roles.teacher.model
    numbers = rows * tokens * int(model.width) * int(model.depth)
    return sum(role.total for role in held), 2 * numbers


def check_memory(
    recipe: Recipe, folder: ModelFolder, roles: Roles, *, processes: int, device: torch.device
) -> None:
    """Raises RecipeError, naming what to lower, for what is larger than the machine."""
    if recipe.distributed.cpu_offload:  # two memories share it
        return
    there = machine_bytes(device)
    held, turn = least_bytes(recipe, folder, roles, processes=processes)
    if there is None or held + turn <= there:
        return
    gib = 2**30
    what = (
        "training.batch_size: lower it, or set training.micro_batch"
        if turn > held
        else "student.weights, student.rank, fake.models: weights with what trains them"
    )
    raise RecipeError(
        f"{what}; at least {(held + turn) / gib:.1f} GiB of memory are needed ({held / gib:.1f} "
        f"held, {turn / gib:.1f} for a turn), {device.type} has {there / gib:.1f}. `twostep plan` "
        "says what helps"
    )
