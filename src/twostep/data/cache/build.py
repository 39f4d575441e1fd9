"""Builds a recipe's teacher cache: alone, or shared among torchrun's processes.

Each process builds its own shards; the first then waits for the rest and writes the manifest. They
meet through the shards on disk, so no process group is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from twostep.data.cache.read import TeacherCache
from twostep.data.cache.shards import CacheError, check_shard, checksum, shard_files
from twostep.data.cache.spec import VERSION, CacheSpec, Shard
from twostep.families.family import PromptBatch
from twostep.inference.sampler import Sampler
from twostep.method.rollout import euler, seeded_noise
from twostep.models.velocity import guided_field
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import Placement, pick_device
from twostep.runtime.files import write_atomically, write_json
from twostep.runtime.processes import local_device, rank_and_world, wait_for
from twostep.runtime.progress import progress_bar

_BATCH = 64


def open_cache(recipe: Recipe, *, repair: bool = False) -> TeacherCache:
    """The recipe's cache, built as far as it is not there yet.

    Every shard is read from end to end once, when it is made or found, by one process.

    Args:
        repair: rebuild shards that are corrupt, truncated or foreign instead of refusing them.

    Raises:
        CacheError: for a bad shard without `repair`.
        ModelError, PromptError, RecipeError: for what the recipe names wrongly.
    """
    spec = CacheSpec.of(recipe)
    rank, size = rank_and_world()
    manifest = spec.folder / "manifest.json"
    if not repair and size == 1 and manifest.exists():
        return TeacherCache(spec)
    device = local_device(pick_device(recipe.training.device))
    sampler = Sampler.load(spec.teacher, placement=Placement(device))
    own = spec.shards[rank::size]
    count = sum(shard.count for shard in own)
    with progress_bar("teach", count, unit="samples", hidden=rank > 0) as advance:
        build(spec, sampler, own, repair=repair, on_samples=advance)
    shards = range(len(spec.shards))
    if rank == 0:

        def all_there() -> bool:
            return all(check_shard(spec, shard, whole=False) is None for shard in shards)

        wait_for(all_there, "the other processes")
        _finish(spec, sampler)
    else:
        wait_for(manifest.exists, "the first process")
    return TeacherCache(spec, trusted=shards)


def build(
    spec: CacheSpec,
    sampler: Sampler,
    shards: Sequence[Shard],
    *,
    repair: bool = False,
    on_samples: Callable[[int], None] = lambda _: None,
) -> None:
    """Makes those of `shards` that are missing.

    Args:
        on_samples: told how many samples each batch (or found shard) added.

    Raises:
        CacheError: for a bad shard without `repair`.
    """
    spec.folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        fault = check_shard(spec, shard.index)
        if fault is None:
            on_samples(shard.count)
            continue
        if fault != "missing" and not repair:
            raise CacheError(f"{fault}. Run again with --repair to rebuild it.")
        _build_shard(spec, sampler, shard, on_samples)


def _finish(spec: CacheSpec, sampler: Sampler) -> None:
    """Writes the manifest, once every shard is there. Called by one process."""
    shards = []
    for shard in range(len(spec.shards)):
        record = json.loads(shard_files(spec.folder, shard)[1].read_text(encoding="utf-8"))
        shards.append({k: record[k] for k in ("file", "sha256", "bytes", "first", "count")})
    empty = {"embeds": sampler.encoder.encode([""])[0].cpu().contiguous()}
    write_atomically(spec.folder / "empty.safetensors", partial(save_file, empty))
    manifest = {
        "version": VERSION,
        "fingerprint": spec.fingerprint,
        "teacher": spec.teacher.name,
        "sigmas": spec.sigmas,
        "guidance_scale": spec.guidance_scale,
        "step2_sigma": spec.schedule.step2_sigma,
        "samples": spec.sample_count,
        "samples_per_prompt": spec.samples_per_prompt,
        "sizes": spec.sizes,
        "shards": shards,
    }
    write_json(spec.folder / "manifest.json", manifest)


def _build_shard(
    spec: CacheSpec, sampler: Sampler, shard: Shard, on_samples: Callable[[int], None]
) -> None:
    count = shard.count
    seeds = [spec.noise_seed(shard.first + i) for i in range(count)]
    embeds = [e.cpu() for e in sampler.encoder.encode(shard.prompts)]
    owners = [i // spec.samples_per_prompt for i in range(count)]
    latents: list[Tensor] = []
    middles: list[Tensor] = []
    for start in range(0, count, _BATCH):
        rows = slice(start, min(start + _BATCH, count))
        batch = PromptBatch.collate([embeds[i] for i in owners[rows]], sampler.device)
        noise = seeded_noise(seeds[rows], sampler.noise_shape(*shard.size)).to(sampler.device)
        result, middle = _teacher_samples(spec, sampler, batch, noise)
        latents.append(result.cpu())
        middles.extend(x.cpu() for x in middle)
        on_samples(len(noise))
    tensors = {
        "latents": torch.cat(latents),
        "seeds": torch.tensor(seeds, dtype=torch.int64),
        "embeds": torch.cat(embeds).contiguous(),
        "offsets": torch.tensor([0, *np.cumsum([len(e) for e in embeds]).tolist()]),
    }
    if middles:
        tensors["trajectory"] = torch.cat(middles)
    weights, sidecar = shard_files(spec.folder, shard.index)
    write_atomically(weights, partial(save_file, tensors))
    record = {
        "file": weights.name,
        "sha256": checksum(weights),
        "bytes": weights.stat().st_size,
        "fingerprint": spec.fingerprint,
        "first": shard.first,
        "count": count,
        "prompts": shard.prompts,
    }
    write_json(sidecar, record)


@torch.no_grad()
def _teacher_samples(
    spec: CacheSpec, sampler: Sampler, prompts: PromptBatch, noise: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The teacher's latents, and those at the student's second noise level if it is on the grid."""
    on_grid = spec.schedule.place_of_step2(spec.steps)
    middle: list[Tensor] = []

    def keep(index: int, x: Tensor) -> None:
        if index + 1 == on_grid:
            middle.append(x)

    empty = None
    if spec.guidance_scale:
        empty = PromptBatch.collate(sampler.encoder.encode([""]), sampler.device)
    field = guided_field(sampler.velocities[0], prompts, empty, spec.guidance_scale)
    return euler(field, noise, spec.sigmas, keep), middle
