"""What test_distributed.py runs under torchrun: the second process dies in its second save."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from twostep.data.cache.build import open_cache
from twostep.distill import checkpoint
from twostep.distill.trainer import Trainer
from twostep.recipe.schema import Recipe
from twostep.runtime.distributed import World

_saves = 0
_save_tensors = checkpoint.save_tensors


def save_then_die(tensors: Mapping[str, Tensor], folder: Path, name: str, world: World) -> None:
    global _saves
    _saves += 1
    if _saves == 2 and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _save_tensors(tensors, folder, name, world)


checkpoint.save_tensors = save_then_die  # type: ignore[assignment]
recipe = Recipe.load(Path(sys.argv[1]))
Trainer(recipe, open_cache(recipe)).train()
