"""A finished teacher cache, read at random."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twostep.data.cache.differences import REPAIR, another_recipe
from twostep.data.cache.shards import CacheError, check_shard, shard_files
from twostep.data.cache.spec import CacheSpec, Shard
from twostep.method.rollout import seeded_noise
from twostep.runtime.checked_tensors import DamagedError, TensorFile, load_checked

_TRIES = 5


@dataclass(frozen=True)
class CachedSamples:
    """Some samples of a cache.

    Attributes:
        ids: sample ids.
        noise: (B, C, H, W), the teacher's initial noise.
        latents: (B, C, H, W), the teacher's result.
        trajectory: (B, C, H, W), the teacher's latents at `step2_sigma`; None if off its grid.
        embeds: one (tokens, D) embedding per sample.
        prompts: one prompt per sample.
    """

    ids: list[int]
    noise: Tensor
    latents: Tensor
    trajectory: Tensor | None
    embeds: list[Tensor]
    prompts: list[str]


class TeacherCache:
    """A finished cache. Its files stay open and are read, not mapped: one may be cut meanwhile.

    Args:
        spec: what it must hold.
        trusted: shards whose checksum was looked at already, or is another process's to look at.

    Raises:
        CacheError: if it is unfinished, belongs to another recipe, or a shard is bad.
    """

    def __init__(self, spec: CacheSpec, trusted: Container[int] = ()) -> None:
        path = spec.folder / "manifest.json"
        if not spec.store.refresh(path):
            raise CacheError(
                f"no finished cache at {spec.location}: run `twostep teach RECIPE` first"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            fingerprint = manifest["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CacheError(f"{path} is not a manifest; mend it: {REPAIR}") from error
        if fingerprint != spec.fingerprint:
            raise CacheError(another_recipe(spec, manifest))
        for shard in range(len(spec.shards)):
            # An object store's shards are checked whenever they are fetched.
            whole = shard not in trusted and not spec.store.is_remote
            fault = check_shard(spec, shard, whole=whole)
            if fault is not None:
                missing = f"{spec.store.shown(shard_files(spec.folder, shard)[0])} is missing"
                raise CacheError(
                    f"{missing if fault == 'missing' else fault}. Rebuild it: {REPAIR}"
                )
        self.spec = spec
        self._firsts = [shard.first for shard in spec.shards]
        self._files: dict[int, TensorFile] = {}
        self._records: dict[int, dict[str, Any]] = {}
        self.empty_embeds = _empty(spec)

    def __len__(self) -> int:
        return self.spec.sample_count

    def caption_lengths(self) -> np.ndarray:
        """Tokens of each sample's caption, (samples,)."""
        if self.spec.store.is_remote:  # the records are here already
            parts = [np.array(self._record(s.index)["tokens"]) for s in self.spec.shards]
        else:
            parts = [np.diff(self._open(s.index).rows("offsets")) for s in self.spec.shards]
        return np.repeat(np.concatenate(parts), self.spec.samples_per_prompt)

    def read(self, ids: Sequence[int]) -> CachedSamples:
        """The named samples, in the order given; all of one size.

        Raises:
            IndexError: for an id that is not in 0 .. len - 1.
        """
        self.ahead(ids)
        latents, middles, embeds, prompts, seeds = [], [], [], [], []
        for sample in ids:
            if not 0 <= sample < len(self):
                raise IndexError(f"sample {sample} is not in 0..{len(self) - 1}")
            shard = self._shard_of(sample)
            row = sample - shard.first
            file = self._open(shard.index)
            latents.append(file.rows("latents", row, row + 1))
            if "trajectory" in file:
                middles.append(file.rows("trajectory", row, row + 1))
            seeds.append(int(file.rows("seeds", row, row + 1)))
            owner = row // self.spec.samples_per_prompt
            start, end = file.rows("offsets", owner, owner + 2).tolist()
            embeds.append(file.rows("embeds", start, end))
            prompts.append(shard.prompts[owner])
        stacked = torch.cat(latents)
        self._check_finite(ids, stacked, *middles, *embeds)
        c, h, w = stacked.shape[1:]
        return CachedSamples(
            ids=list(ids),
            noise=seeded_noise(seeds, (c, h, w)),
            latents=stacked,
            trajectory=torch.cat(middles) if middles else None,
            embeds=embeds,
            prompts=prompts,
        )

    def _check_finite(self, ids: Sequence[int], latents: Tensor, *others: Tensor) -> None:
        """Caches of earlier versions may hold what no network can learn from."""
        finite = latents.flatten(1).isfinite().all(1)
        if bool(finite.all()) and all(bool(each.isfinite().all()) for each in others):
            return
        bad = [i for i, good in zip(ids, finite.tolist(), strict=True) if not good] or list(ids)
        path = shard_files(self.spec.folder, self._shard_of(bad[0]).index)[0]
        raise CacheError(
            f"{self.spec.store.shown(path)}: sample {bad[0]} holds values that are not finite. "
            "Remove the file and run `twostep teach RECIPE` again"
        )

    def ahead(self, ids: Sequence[int]) -> None:
        """Lets an object store bring the files of samples that will be read soon."""
        if self.spec.store.is_remote:
            places = {self._shard_of(sample).index for sample in ids if 0 <= sample < len(self)}
            paths = {place: shard_files(self.spec.folder, place)[0] for place in places}
            self.spec.store.ahead({p: self._record(i)["sha256"] for i, p in paths.items()})

    def files_at_once(self) -> tuple[np.ndarray, int] | None:
        """Each sample's file, by id, and from how many samples may be drawn at a time.

        None where all have room. Otherwise a quarter of the room: two purposes read at a time, and
        the next group comes while the last is read.
        """
        if self.spec.store.room is None:
            return None
        room, shards = self.spec.store.room, self.spec.shards
        sizes = [self._record(shard.index)["bytes"] for shard in shards]
        if sum(sizes) <= room:
            return None
        file_of = np.repeat(np.arange(len(shards)), [shard.count for shard in shards])
        return file_of, max(1, room // (4 * max(sizes)))

    def _shard_of(self, sample: int) -> Shard:
        return self.spec.shards[bisect_right(self._firsts, sample) - 1]

    def _record(self, shard: int) -> dict[str, Any]:
        if shard not in self._records:
            path = shard_files(self.spec.folder, shard)[1]
            self._records[shard] = json.loads(path.read_text(encoding="utf-8"))
        return self._records[shard]

    def _open(self, shard: int) -> TensorFile:
        if shard not in self._files:
            store, path = self.spec.store, shard_files(self.spec.folder, shard)[0]
            if store.is_remote:
                self._let_go()
            try:
                self._files[shard] = self._opened(path, shard)
            except OSError as error:
                raise CacheError(f"{store.shown(path)} cannot be read: {error}") from error
        return self._files[shard]

    def _opened(self, path: Path, shard: int) -> TensorFile:
        if not self.spec.store.is_remote:
            return TensorFile(path)
        for _ in range(_TRIES):  # a copy may have made room before it is opened
            self.spec.store.fetch(path, self._record(shard)["sha256"])
            with suppress(FileNotFoundError):
                return TensorFile(path)
        raise CacheError(f"data.cache_copies_gib: too little for what is read at a time of {path}")

    def _let_go(self) -> None:
        """Closes copies that have made room: until then the disk keeps them."""
        gone = [i for i in self._files if not shard_files(self.spec.folder, i)[0].exists()]
        for shard in gone:
            del self._files[shard]


def _empty(spec: CacheSpec) -> Tensor:
    """The empty prompt's embedding."""
    path = spec.folder / "empty.safetensors"
    try:
        tensors, _ = load_checked(spec.store.fetch(path))
        embeds = tensors["embeds"]
        if not bool(embeds.isfinite().all()):
            raise CacheError(f"{spec.store.shown(path)} holds values that are not finite")
    except (DamagedError, OSError, KeyError) as error:
        raise CacheError(
            f"{spec.store.shown(path)} is missing or damaged: run `twostep teach --repair`"
        ) from error
    return embeds
