"""A finished teacher cache, read at random."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twostep.data.cache.shards import CacheError, check_shard, shard_files
from twostep.data.cache.spec import CacheSpec
from twostep.method.rollout import seeded_noise


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
    """A finished cache, memory-mapped.

    Args:
        spec: what it must hold.
        trusted: shards whose checksum was looked at already, or is another process's to look at.

    Raises:
        CacheError: if it is unfinished, belongs to another recipe, or a shard is bad.
    """

    def __init__(self, spec: CacheSpec, trusted: Container[int] = ()) -> None:
        path = spec.folder / "manifest.json"
        if not path.is_file():
            raise CacheError(f"no finished cache at {spec.folder}: run `twostep teach` first")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            fingerprint = manifest["fingerprint"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise CacheError(f"{path} is not a manifest: run `twostep teach` again") from error
        if fingerprint != spec.fingerprint:
            raise CacheError(
                f"{spec.folder} was made with another teacher, schedule or prompt set: "
                "run `twostep teach --repair`, or name another data.cache"
            )
        for shard in range(len(spec.shards)):
            fault = check_shard(spec, shard, whole=shard not in trusted)
            if fault is not None:
                missing = f"{shard_files(spec.folder, shard)[0]} is missing"
                raise CacheError(
                    f"{missing if fault == 'missing' else fault}. "
                    "Run `twostep teach --repair` to rebuild it."
                )
        self.spec = spec
        self._firsts = [shard.first for shard in spec.shards]
        self._files: dict[int, Any] = {}
        with safe_open(spec.folder / "empty.safetensors", "pt") as file:
            self.empty_embeds: Tensor = file.get_tensor("embeds")

    def __len__(self) -> int:
        return self.spec.sample_count

    def caption_lengths(self) -> np.ndarray:
        """Tokens of each sample's caption, (samples,)."""
        parts = [np.diff(self._open(s.index).get_tensor("offsets")) for s in self.spec.shards]
        return np.repeat(np.concatenate(parts), self.spec.samples_per_prompt)

    def read(self, ids: Sequence[int]) -> CachedSamples:
        """The named samples, in the order given; all of one size.

        Raises:
            IndexError: for an id that is not in 0 .. len - 1.
        """
        latents, middles, embeds, prompts, seeds = [], [], [], [], []
        for sample in ids:
            if not 0 <= sample < len(self):
                raise IndexError(f"sample {sample} is not in 0..{len(self) - 1}")
            shard = self.spec.shards[bisect_right(self._firsts, sample) - 1]
            row = sample - shard.first
            file = self._open(shard.index)
            latents.append(file.get_slice("latents")[row : row + 1])
            if "trajectory" in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                middles.append(file.get_slice("trajectory")[row : row + 1])
            seeds.append(int(file.get_slice("seeds")[row : row + 1]))
            owner = row // self.spec.samples_per_prompt
            start, end = file.get_slice("offsets")[owner : owner + 2].tolist()
            embeds.append(file.get_slice("embeds")[start:end])
            prompts.append(shard.prompts[owner])
        stacked = torch.cat(latents)
        c, h, w = stacked.shape[1:]
        return CachedSamples(
            ids=list(ids),
            noise=seeded_noise(seeds, (c, h, w)),
            latents=stacked,
            trajectory=torch.cat(middles) if middles else None,
            embeds=embeds,
            prompts=prompts,
        )

    def _open(self, shard: int) -> Any:
        if shard not in self._files:
            path = shard_files(self.spec.folder, shard)[0]
            try:
                self._files[shard] = safe_open(path, "pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise CacheError(f"{path} cannot be read: {error}") from error
        return self._files[shard]
