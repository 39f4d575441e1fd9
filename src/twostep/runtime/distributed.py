"""The processes of one training run, as torchrun starts them; one process alone needs none of it.

Every process runs the same turns on its own rows of each batch. What a turn computes is a function
of the batch, not of how many processes share it.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from twostep.runtime.processes import Share

# Ranks that this process had.
_joined: list[int] = []


class World:
    """This process among its fellows.

    Args:
        device: this process's own; decides between NCCL and gloo.
    """

    def __init__(self, device: torch.device) -> None:
        here = Share.here()
        self.rank, self.size = here.rank, here.size
        self.device = device
        self._background: dist.ProcessGroup | None = None
        if self.size > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # gloo beside NCCL serves what lives on the CPU: offloaded weights and checkpoints.
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            _joined.append(self.rank)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each scalar's mean over the processes."""
        if self.size == 1 or not values:
            return dict(values)
        stacked = torch.stack([v.detach().float() for v in values.values()])
        dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.size).unbind(), strict=True))

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages the gradients of parameters that every process holds whole.

        Sharded parameters' gradients are averaged as they are reduced.
        """
        if self.size == 1:
            return
        gradients = [
            p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)
        ]
        if gradients:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            flat /= self.size
            for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(part.view_as(g))

    def largest(self, values: Sequence[float]) -> list[float]:
        """Each value's maximum over the processes: what all of them act on."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def share(self, count: int) -> list[int]:
        """This process's part of `count` rows, as many for every process: some get one twice."""
        each = -(-count // self.size)
        return [(self.rank * each + i) % count for i in range(each)]

    def gather(self, share: Tensor, count: int) -> Tensor:
        """All `count` rows, from every process's `share`, on CPU."""
        if self.size == 1:
            return share.cpu()
        parts = [torch.empty_like(share, device="cpu") for _ in range(self.size)]
        dist.all_gather(parts, share.cpu().contiguous())
        return torch.cat(parts)[:count]

    def background_group(self) -> dist.ProcessGroup:
        """A group for what runs beside training; the first call is for every process."""
        if self._background is None:
            self._background = dist.new_group(backend="gloo")
        return self._background

    def wait(self) -> None:
        """Until every process has come this far."""
        if self.size > 1:
            # A reduction on the CPU rather than a barrier, which NCCL would run on some GPU.
            dist.all_reduce(torch.zeros(1))

    def leave(self) -> None:
        """Ends what joining began; the process may not train on."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def end_process(code: int) -> None:
    """Ends a process that was one of several at once, put away and flushed; others go on.

    gloo's threads outlive their group where a mesh or a cache holds it. One that lets go of its
    last tensor while the interpreter ends asks for its lock, is thrown out, and takes the process
    with it ("terminate called without an active exception", exit -6).
    """
    if not _joined:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def own_part(value: Tensor, like: DTensor) -> Tensor:
    """This process's part of `value`, split as `like` is; every process has all of `value`."""
    for dimension, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            place = like.device_mesh.get_local_rank(dimension)
            parts = value.chunk(like.device_mesh.size(dimension), placement.dim)
            value = parts[place] if place < len(parts) else value.narrow(placement.dim, 0, 0)
    return value


def gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
