"""Builds a recipe's teacher cache: alone, or shared among torchrun's processes.

Each process builds its own shards; the first then waits for the rest and writes the manifest. They
meet through the shards on disk, so no process group is needed.

Prompts come first and pictures after: the text encoder is let go before the transformer is read, so
that a device need never hold both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from twostep.data.cache.differences import described
from twostep.data.cache.encoded import EncodedPrompts
from twostep.data.cache.read import TeacherCache
from twostep.data.cache.shards import CacheError, check_shard, checksum, shard_files
from twostep.data.cache.spec import VERSION, CacheSpec, Shard
from twostep.families.family import PromptBatch
from twostep.method.rollout import euler, seeded_noise
from twostep.models.velocity import Velocity, guided_field
from twostep.recipe.schema import Recipe
from twostep.runtime.checked_tensors import save_checked
from twostep.runtime.devices import Placement, pick_device
from twostep.runtime.files import make_folder, sweep, write_atomically, write_json
from twostep.runtime.images import pictures_at_once
from twostep.runtime.locks import locked
from twostep.runtime.processes import Share, beat, end_beats, local_device, wait_for
from twostep.runtime.progress import progress_bar


def open_cache(recipe: Recipe, *, repair: bool = False) -> TeacherCache:
    """The recipe's cache, built as far as it is not there yet.

    Every shard is read from end to end once, when it is made or found, by one process. The teacher
    computes in `teacher.dtype`.

    Args:
        repair: rebuild shards that are corrupt, truncated or foreign instead of refusing them.

    Raises:
        CacheError: for a bad shard without `repair`.
        ModelError, PromptError, RecipeError: for what the recipe names wrongly.
    """
    spec = CacheSpec.of(recipe)
    share = Share.here()
    manifest = spec.folder / "manifest.json"
    if not repair and share.size == 1 and spec.store.refresh(manifest):
        return TeacherCache(spec)
    device = local_device(pick_device(recipe.training.device))
    placement = Placement(device, getattr(torch, recipe.teacher.dtype))
    with _taken(spec, share):
        return _built(spec, share, repair=repair, placement=placement)


def _taken(spec: CacheSpec, share: Share) -> AbstractContextManager[None]:
    """The cache for this process alone, or for torchrun's; others of the same data wait."""
    if spec.store.is_remote or not share.is_first:
        return nullcontext()
    return locked(spec.folder, option="data.cache", purpose=spec.fingerprint, wait=True)


def _built(spec: CacheSpec, share: Share, *, repair: bool, placement: Placement) -> TeacherCache:
    manifest = spec.folder / "manifest.json"
    own = share.of(spec.shards)
    if share.is_first:
        sweep(spec.folder)
    missing = find_missing(spec, own, repair=repair)
    finishes = share.is_first and (repair or missing != [] or not _has_manifest(spec))
    if missing or finishes:
        make_folder(spec.folder)
        beat(spec.folder, share)
        encoded = EncodedPrompts.encode(spec, missing, placement, hidden=not share.is_first)
    count = sum(shard.count for shard in own)
    with progress_bar("teach", count, unit="samples", hidden=not share.is_first) as advance:

        def on_samples(made: int) -> None:
            advance(made)
            beat(spec.folder, share)

        advance(count - sum(shard.count for shard in missing))
        if missing:
            velocity, *_ = spec.teacher.velocities(placement)
            build(
                spec,
                velocity,
                missing,
                encoded=encoded,
                device=placement.device,
                on_samples=on_samples,
            )
    shards = range(len(spec.shards))
    left = list(shards)

    def all_there() -> bool:
        while left and check_shard(spec, left[-1], whole=False) is None:
            left.pop()
        return not left

    wait_for(all_there, share, what=lambda: _fault_of(spec, left[-1]), folder=spec.folder)
    if finishes:
        _finish(spec, encoded)
    else:
        wait_for(
            partial(_has_manifest, spec),
            share,
            what=lambda: f"{manifest} is not written for this recipe",
            folder=spec.folder,
        )
    if share.size > 1 and share.is_first:
        end_beats(spec.folder)
    return TeacherCache(spec, trusted=shards)


def _fault_of(spec: CacheSpec, shard: int) -> str:
    """What keeps a shard from being read, in words."""
    fault = check_shard(spec, shard, whole=False)
    return f"{shard_files(spec.folder, shard)[0]} is missing" if fault == "missing" else str(fault)


def find_missing(spec: CacheSpec, shards: Sequence[Shard], *, repair: bool = False) -> list[Shard]:
    """Those of `shards` that are to be made.

    Raises:
        CacheError: for a bad shard without `repair`.
    """
    missing = []
    for shard in shards:
        # An object store's shards are checked whenever they are fetched.
        fault = check_shard(spec, shard.index, whole=repair or not spec.store.is_remote)
        if fault is None:
            continue
        if fault != "missing" and not repair:
            raise CacheError(f"{fault}. Run again with --repair to rebuild it.")
        missing.append(shard)
    return missing


@torch.no_grad()
def build(
    spec: CacheSpec,
    velocity: Velocity,
    shards: Sequence[Shard],
    *,
    encoded: EncodedPrompts,
    device: torch.device,
    on_samples: Callable[[int], None] = lambda _: None,
) -> None:
    """Makes `shards`.

    Args:
        velocity: the teacher's, on `device`.
        encoded: the embeddings of their prompts.
        on_samples: told how many samples each batch added.
    """
    for shard in shards:
        embeds = encoded.read(shard)
        latents: list[Tensor] = []
        middles: list[Tensor] = []
        owners = [i // spec.samples_per_prompt for i in range(shard.count)]
        seeds = [spec.noise_seed(shard.first + i) for i in range(shard.count)]
        batch_size = pictures_at_once(*shard.size)
        for start in range(0, shard.count, batch_size):
            rows = slice(start, min(start + batch_size, shard.count))
            batch = PromptBatch.collate([embeds[i] for i in owners[rows]], device)
            empty = None
            if spec.guidance_scale:
                empty = PromptBatch.collate([encoded.empty], device)
            field = guided_field(velocity, batch, empty, spec.guidance_scale)
            noise = seeded_noise(seeds[rows], spec.teacher.space.shape(*shard.size)).to(device)
            result, middle = _teacher_samples(spec, field, noise)
            prompts = [shard.prompts[i] for i in owners[rows]]
            _check_finite([result, *middle], prompts, spec)
            latents.append(result.cpu())
            middles.extend(x.cpu() for x in middle)
            on_samples(len(noise))
        _write_shard(spec, shard, seeds, embeds, latents=latents, middles=middles)
        encoded.remove(shard)


def _check_finite(tensors: Sequence[Tensor], prompts: Sequence[str], spec: CacheSpec) -> None:
    """Raises CacheError, naming the prompts, for samples that nobody could learn from."""
    finite = torch.stack([t.flatten(1).isfinite().all(1) for t in tensors]).all(0).tolist()
    bad = list(dict.fromkeys(p for p, good in zip(prompts, finite, strict=True) if not good))
    if bad:
        shown = ", ".join(repr(prompt[:60]) for prompt in bad[:3])
        raise CacheError(
            f"teacher.model: {spec.teacher.name} gives images that are not finite for "
            f"{len(bad)} of {len(set(prompts))} prompts, such as {shown}; nothing of them is "
            f"cached. Look at its weights, or at teacher.dtype ({spec.dtype})"
        )


def _teacher_samples(
    spec: CacheSpec, field: Callable[[Tensor, Tensor], Tensor], noise: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The teacher's latents, and those at the student's second noise level if it is on the grid."""
    on_grid = spec.schedule.place_of_step2(spec.steps)
    middle: list[Tensor] = []

    def keep(index: int, x: Tensor) -> None:
        if index + 1 == on_grid:
            middle.append(x)

    return euler(field, noise, spec.sigmas, keep), middle


def _write_shard(
    spec: CacheSpec,
    shard: Shard,
    seeds: Sequence[int],
    embeds: Sequence[Tensor],
    *,
    latents: Sequence[Tensor],
    middles: Sequence[Tensor],
) -> None:
    tensors = {
        "latents": torch.cat(list(latents)),
        "seeds": torch.tensor(seeds, dtype=torch.int64),
        "embeds": torch.cat(list(embeds)).contiguous(),
        "offsets": torch.tensor([0, *np.cumsum([len(e) for e in embeds]).tolist()]),
    }
    if middles:
        tensors["trajectory"] = torch.cat(list(middles))
    weights, sidecar = shard_files(spec.folder, shard.index)
    write_atomically(weights, partial(save_file, tensors))
    spec.store.put(weights)
    record = {
        "file": weights.name,
        "sha256": checksum(weights),
        "bytes": weights.stat().st_size,
        "fingerprint": spec.fingerprint,
        "first": shard.first,
        "count": shard.count,
        "prompts": shard.prompts,
        "tokens": [len(e) for e in embeds],
    }
    write_json(sidecar, record)
    spec.store.put(sidecar)


def _has_manifest(spec: CacheSpec) -> bool:
    """Whether the cache was finished, for this very recipe."""
    path = spec.folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8")) if spec.store.refresh(path) else {}
        return bool(manifest["fingerprint"] == spec.fingerprint)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _finish(spec: CacheSpec, encoded: EncodedPrompts) -> None:
    """Writes the manifest, once every shard is there. Called by one process."""
    shards = []
    for shard in range(len(spec.shards)):
        record = json.loads(shard_files(spec.folder, shard)[1].read_text(encoding="utf-8"))
        shards.append({k: record[k] for k in ("file", "sha256", "bytes", "first", "count")})
    empty = {"embeds": encoded.empty}
    write_atomically(spec.folder / "empty.safetensors", partial(save_checked, empty))
    spec.store.put(spec.folder / "empty.safetensors")
    manifest = {
        "version": VERSION,
        "fingerprint": spec.fingerprint,
        **described(spec),
        "shards": shards,
    }
    write_json(spec.folder / "manifest.json", manifest)
    spec.store.put(spec.folder / "manifest.json")
