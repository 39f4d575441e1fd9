"""Builds the teacher cache of a recipe: alone, or shared among torchrun's processes."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twostep.data.cache.build import TeacherCache, build, check_shard, finish
from twostep.data.cache.spec import Plan
from twostep.inference.sampler import Sampler
from twostep.recipe.schema import (
    Recipe,
)
from twostep.runtime.devices import pick_device
from twostep.runtime.processes import local_device, rank_and_world, wait_for


def teach(recipe: Recipe, repair: bool = False) -> TeacherCache:
    """The recipe's cache, built as far as it is not there yet.

    Under torchrun each process builds its own shards; the first then waits for the rest and
    writes the manifest. They meet through the shards on disk, so no process group is needed.

    Raises:
        CacheError: for a bad shard without `repair`.
    """
    plan = Plan.of(recipe)
    rank, world = rank_and_world()
    if not repair and world == 1 and (plan.folder / "manifest.json").exists():
        return TeacherCache(plan)
    sampler = Sampler.load(str(plan.teacher), local_device(pick_device(recipe.training.device)))
    console = Console(stderr=True)
    columns = (
        TextColumn("teach"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )  # fmt: skip
    started, done = time.monotonic(), 0
    mine = sum(shard.count for shard in plan.shards[rank::world])
    with Progress(*columns, console=console, disable=rank > 0) as bars:
        bar = bars.add_task("", total=mine, rate="")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            rate = done / (time.monotonic() - started)
            bars.update(bar, advance=count, rate=f"{rate:.1f} samples/s")

        build(plan, sampler, rank, world, repair, advance)
    if rank == 0:
        _wait_for_others(plan)
        finish(plan, sampler)
    else:
        wait_for(lambda: (plan.folder / "manifest.json").exists(), "the first process")
    return TeacherCache(plan)


def _wait_for_others(plan: Plan) -> None:
    shards = range(len(plan.shards))
    wait_for(lambda: all(check_shard(plan, s) is None for s in shards), "the other processes")
