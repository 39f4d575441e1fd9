"""The teacher's samples on disk: built once, resumable, verified, read at random.

A cache is a folder:
    manifest.json              what the samples depend on (`fingerprint`) and the list of shards
    empty.safetensors          embedding of the empty prompt, for guidance
    shard-00000.safetensors    latents, seeds and prompt embeddings of some samples
    shard-00000.json           its checksum, sample ids and prompts; written after the shard

Samples of one prompt lie side by side, so that its embedding is stored once.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twostep.data.cache.spec import VERSION, Plan, Shard
from twostep.errors import UserError
from twostep.families.zimage import PromptBatch
from twostep.inference.sampler import Sampler, bind
from twostep.method.rollout import euler, guided, seeded_noise
from twostep.runtime.files import write_atomically

_BATCH = 64


class CacheError(UserError, RuntimeError):
    """A cache that cannot be used; the message names the file and what to do."""


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _names(folder: Path, shard: int) -> tuple[Path, Path]:
    stem = f"shard-{shard:05d}"
    return folder / f"{stem}.safetensors", folder / f"{stem}.json"


def check_shard(plan: Plan, shard: int) -> str | None:
    """What is wrong with a shard: None if nothing, "missing", or a sentence."""
    weights, sidecar = _names(plan.folder, shard)
    if not sidecar.exists():
        return "missing"
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        expected = record["sha256"], record["bytes"], record["fingerprint"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"{sidecar} is not a shard's record"
    if not weights.exists():
        return f"{weights} is gone, though {sidecar.name} is there"
    if expected[2] != plan.fingerprint:
        return f"{weights} belongs to another teacher, schedule or prompt set"
    if weights.stat().st_size != expected[1]:
        return f"{weights} has {weights.stat().st_size} bytes, expected {expected[1]}: truncated"
    if _checksum(weights) != expected[0]:
        return f"{weights} is corrupt: its checksum is not the one in {sidecar.name}"
    return None


def build(
    plan: Plan,
    sampler: Sampler,
    rank: int = 0,
    world: int = 1,
    repair: bool = False,
    on_samples: Callable[[int], None] | None = None,
) -> None:
    """Makes the shards that are missing, `rank` of `world` processes taking every `world`-th.

    Args:
        repair: rebuild shards that are corrupt, truncated or foreign instead of refusing them.
        on_samples: told how many samples each batch (or found shard) added.

    Raises:
        CacheError: for a bad shard without `repair`.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    for shard in plan.shards[rank::world]:
        fault = check_shard(plan, shard.index)
        if fault is None:
            if on_samples:
                on_samples(shard.count)
            continue
        if fault != "missing" and not repair:
            raise CacheError(f"{fault}. Run again with --repair to rebuild it.")
        _build_shard(plan, sampler, shard, on_samples)


def finish(plan: Plan, sampler: Sampler) -> None:
    """Writes the manifest, once every shard is there. Called by one process.

    Raises:
        CacheError: if a shard is missing.
    """
    shards = []
    for shard in range(len(plan.shards)):
        weights, sidecar = _names(plan.folder, shard)
        if not sidecar.exists():
            raise CacheError(f"{weights} was not built")
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        shards.append({k: record[k] for k in ("file", "sha256", "bytes", "first", "count")})
    empty = {"embeds": sampler.encoder.encode([""])[0].cpu().contiguous()}
    write_atomically(plan.folder / "empty.safetensors", lambda path: save_file(empty, path))
    manifest = {
        "version": VERSION,
        "fingerprint": plan.fingerprint,
        "teacher": str(plan.teacher),
        "sigmas": plan.sigmas,
        "guidance_scale": plan.guidance_scale,
        "step2_sigma": plan.step2_sigma,
        "samples": plan.sample_count,
        "samples_per_prompt": plan.samples_per_prompt,
        "sizes": plan.sizes,
        "shards": shards,
    }
    _write_json(plan.folder / "manifest.json", manifest)


def _build_shard(
    plan: Plan, sampler: Sampler, shard: Shard, on_samples: Callable[[int], None] | None
) -> None:
    count = shard.count
    seeds = [plan.noise_seed(shard.first + i) for i in range(count)]
    embeds = [e.cpu() for e in sampler.encoder.encode(shard.prompts)]
    owners = [i // plan.samples_per_prompt for i in range(count)]
    shape = sampler.noise_shape(*shard.size)
    on_grid = _index_on_grid(plan)
    latents: list[Tensor] = []
    middles: list[Tensor] = []
    for start in range(0, count, _BATCH):
        rows = slice(start, min(start + _BATCH, count))
        batch = PromptBatch.collate([embeds[i] for i in owners[rows]], sampler.device)
        middle: list[Tensor] = []

        def keep(index: int, x: Tensor, middle: list[Tensor] = middle) -> None:
            if index + 1 == on_grid:
                middle.append(x)

        unconditional = None
        if plan.guidance_scale:
            empty = PromptBatch.collate(sampler.encoder.encode([""]), sampler.device)
            unconditional = bind(sampler.field, empty.expand(len(batch)))
        field = guided(bind(sampler.field, batch), unconditional, plan.guidance_scale)
        noise = seeded_noise(seeds[rows], shape).to(sampler.device)
        with torch.no_grad():
            latents.append(euler(field, noise, plan.sigmas, keep).cpu())
        middles.extend(x.cpu() for x in middle)
        if on_samples:
            on_samples(len(noise))
    tensors = {
        "latents": torch.cat(latents),
        "seeds": torch.tensor(seeds, dtype=torch.int64),
        "embeds": torch.cat(embeds).contiguous(),
        "offsets": torch.tensor([0, *np.cumsum([len(e) for e in embeds]).tolist()]),
    }
    if middles:
        tensors["trajectory"] = torch.cat(middles)
    weights, sidecar = _names(plan.folder, shard.index)
    write_atomically(weights, lambda path: save_file(tensors, path))
    record = {
        "file": weights.name,
        "sha256": _checksum(weights),
        "bytes": weights.stat().st_size,
        "fingerprint": plan.fingerprint,
        "first": shard.first,
        "count": count,
        "prompts": shard.prompts,
    }
    _write_json(sidecar, record)


def _index_on_grid(plan: Plan) -> int | None:
    """Where the student's second noise level lies on the teacher's grid, if it does."""
    for index, sigma in enumerate(plan.sigmas):
        if abs(sigma - plan.step2_sigma) < 1e-6:
            return index
    return None


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
        plan: what it must hold.

    Raises:
        CacheError: if it is unfinished, belongs to another plan, or a shard is bad.
    """

    def __init__(self, plan: Plan) -> None:
        path = plan.folder / "manifest.json"
        if not path.is_file():
            raise CacheError(f"no finished cache at {plan.folder}: run `twostep teach` first")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            fingerprint = manifest["fingerprint"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise CacheError(f"{path} is not a manifest: run `twostep teach` again") from error
        if fingerprint != plan.fingerprint:
            raise CacheError(
                f"{plan.folder} was made with another teacher, schedule or prompt set: "
                "run `twostep teach --repair`, or name another data.cache"
            )
        for shard in range(len(plan.shards)):
            fault = check_shard(plan, shard)
            if fault is not None:
                missing = f"{_names(plan.folder, shard)[0]} is missing"
                raise CacheError(
                    f"{missing if fault == 'missing' else fault}. "
                    "Run `twostep teach --repair` to rebuild it."
                )
        self.plan = plan
        self._firsts = [shard.first for shard in plan.shards]
        self._files: dict[int, Any] = {}
        with safe_open(plan.folder / "empty.safetensors", "pt") as file:
            self.empty_embeds: Tensor = file.get_tensor("embeds")

    def __len__(self) -> int:
        return self.plan.sample_count

    def caption_lengths(self) -> np.ndarray:
        """Tokens of each sample's caption, (samples,)."""
        parts = [np.diff(self._open(s.index).get_tensor("offsets")) for s in self.plan.shards]
        return np.repeat(np.concatenate(parts), self.plan.samples_per_prompt)

    def read(self, ids: Sequence[int]) -> CachedSamples:
        """The named samples, in the order given; all of one size.

        Raises:
            IndexError: for an id that is not in 0 .. len - 1.
        """
        latents, middles, embeds, prompts, seeds = [], [], [], [], []
        for sample in ids:
            if not 0 <= sample < len(self):
                raise IndexError(f"sample {sample} is not in 0..{len(self) - 1}")
            shard = self.plan.shards[bisect_right(self._firsts, sample) - 1]
            row = sample - shard.first
            file = self._open(shard.index)
            latents.append(file.get_slice("latents")[row : row + 1])
            if "trajectory" in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                middles.append(file.get_slice("trajectory")[row : row + 1])
            seeds.append(int(file.get_slice("seeds")[row : row + 1]))
            owner = row // self.plan.samples_per_prompt
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
            path = _names(self.plan.folder, shard)[0]
            try:
                self._files[shard] = safe_open(path, "pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise CacheError(f"{path} cannot be read: {error}") from error
        return self._files[shard]
