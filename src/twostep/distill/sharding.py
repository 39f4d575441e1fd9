"""Weights split over processes by FSDP2: each holds a part, blocks are put together as they run."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from twostep.errors import RecipeError
from twostep.models.folder import ModelFolder
from twostep.recipe.schema import Recipe
from twostep.runtime.distributed import World


class Sharder:
    """Loads models whose weights are split over the processes of `world`.

    Raises:
        RecipeError: if `distributed.shard_size` does not divide the number of processes.
    """

    def __init__(self, recipe: Recipe, world: World) -> None:
        settings = recipe.distributed
        self.mesh = _mesh(world, settings.shard_size)
        on_cuda = world.device.type == "cuda"
        # Blocks are gathered in the type they compute in. Inputs are not cast: a noise level
        # rounded to bf16 is another noise level.
        self.policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if on_cuda and recipe.training.autocast else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        # Pinned memory is for copies to a GPU; torch refuses to pin any without one.
        offload = CPUOffloadPolicy(pin_memory=on_cuda)
        self.offload = offload if settings.cpu_offload else OffloadPolicy()
        self.device = torch.device("cpu") if settings.cpu_offload else world.device

    def load(self, folder: ModelFolder, part: str, dtype: torch.dtype) -> Any:
        """The folder's network; each process reads its own part of the files."""
        model = folder.family.without_weights(folder.base, part, dtype)
        for module in (*folder.family.blocks(model), model):
            fully_shard(
                module,
                mesh=self.mesh,
                mp_policy=self.policy,
                offload_policy=self.offload,
                # For the root too: weights that stayed whole after a forward without a backward
                # would miss the next update.
                reshard_after_forward=True,
            )
        model.to_empty(device=self.device)
        state = model.state_dict()
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder.base / part)))
        model.load_state_dict(state)
        folder.add_loras(model)
        return model


def shard_size(world: World, asked: int | None) -> int:
    """How many processes share one set of weights; those of one machine if nothing is asked for.

    Between machines all of them where that leaves a rest.
    """
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return asked or (world.size if world.size % on_machine else on_machine)


def _mesh(world: World, asked: int | None) -> DeviceMesh:
    size = shard_size(world, asked)
    if world.size % size:
        raise RecipeError(
            f"distributed.shard_size: {size} does not divide the {world.size} processes"
        )
    kind = world.device.type
    if size == world.size:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(kind, (world.size // size, size), mesh_dim_names=names)
