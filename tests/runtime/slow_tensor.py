"""Ends while gloo's thread is the last to hold a tensor, one that takes a moment to go."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from twostep.runtime import distributed


class Slow(torch.Tensor):
    def __del__(self) -> None:
        time.sleep(2)


os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
held = dist.group.WORLD  # as meshes and DTensor's caches do
tensor = torch.zeros(1000).as_subclass(Slow)
with torch._C.DisableTorchFunctionSubclass():
    work = dist.all_reduce(tensor, async_op=True)
del tensor, work
dist.destroy_process_group()
distributed._joined.append(0)
print("done")
distributed.end_process(3)
