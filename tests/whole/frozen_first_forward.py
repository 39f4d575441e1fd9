"""One of two processes: sharded weights of a role whose first forward was without gradient.

Prints the types in which gradients were reduced, and how far they are from those of a role that
had no such forward.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from tiny import TEXT_WIDTH
from twostep.distill.objectives.roles import Role
from twostep.distill.sharding import Sharder
from twostep.families.family import PromptBatch
from twostep.models.folder import ModelFolder
from twostep.recipe.schema import Recipe
from twostep.runtime.distributed import World, gathered

torch.set_num_threads(1)
recipe, world = Recipe.load(sys.argv[1]), World(torch.device("cpu"))
folder, sharder = ModelFolder.open(recipe.teacher.model), Sharder(recipe, world)
# As on a GPU under autocast.
sharder.policy = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)
reduced: list[str] = []


def noting(reduce_scatter: Any) -> Any:
    def note(*rest: Any, **named: Any) -> Any:
        tensors = [value for value in (*rest, *named.values()) if isinstance(value, Tensor)]
        reduced.extend(str(tensor.dtype) for tensor in tensors)
        return reduce_scatter(*rest, **named)

    return note


# FSDP2's call has another name from torch 2.13 on.
for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
    if hasattr(dist, name):
        setattr(dist, name, noting(getattr(dist, name)))
torch.manual_seed(world.rank)
latents, sigma = torch.randn(2, 8, 4, 4), torch.tensor([0.4, 0.8])
prompts = PromptBatch.collate([torch.randn(5, TEXT_WIDTH), torch.randn(3, TEXT_WIDTH)])
found = []
for frozen_first in (False, True):
    role = Role.full(sharder.load(folder, "transformer", torch.float32), trainable=True)
    with torch.autocast("cpu", torch.bfloat16):
        if frozen_first:
            with torch.no_grad():
                role(latents, sigma, prompts)
        loss = role(latents, sigma, prompts).velocity.square().mean()
    loss.backward()
    found.append([gathered(p.grad) for p in role.parameters() if p.grad is not None])
largest = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
if world.is_first:
    print(f"{sorted(set(reduced))} {len(reduced) > 0} {len(found[0]) > 30} {largest}")
dist.destroy_process_group()
