"""The files of a teacher cache: their names, and whether they are what they should be.

A cache is a folder:
    manifest.json              what the samples depend on (`fingerprint`) and the list of shards
    empty.safetensors          embedding of the empty prompt, for guidance
    shard-00000.safetensors    latents, seeds and prompt embeddings of some samples
    shard-00000.json           its checksum, sample ids and prompts; written after the shard

Samples of one prompt lie side by side, so that its embedding is stored once.
"""

from __future__ import annotations

import json
from pathlib import Path

from twostep.data.cache.spec import CacheSpec
from twostep.data.cache.store import CacheError, checksum

__all__ = ["CacheError", "check_shard", "checksum", "shard_files"]


def shard_files(folder: Path, shard: int) -> tuple[Path, Path]:
    stem = f"shard-{shard:05d}"
    return folder / f"{stem}.safetensors", folder / f"{stem}.json"


def check_shard(spec: CacheSpec, shard: int, *, whole: bool = True) -> str | None:
    """What is wrong with a shard: None if nothing, "missing", or a sentence.

    Args:
        whole: read it from end to end for its checksum; otherwise its size must do.
    """
    store = spec.store
    weights, sidecar = shard_files(spec.folder, shard)
    if not store.refresh(sidecar):
        return "missing"
    shown = store.shown(weights)
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        expected = record["sha256"], record["bytes"], record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{store.shown(sidecar)} is not a shard's record"
    size = store.size(weights)
    if size is None:
        return f"{shown} is gone, though {sidecar.name} is there"
    if expected[2] != spec.fingerprint:
        return f"{shown} belongs to another teacher, schedule or prompt set"
    if size != expected[1]:
        return f"{shown} has {size} bytes, expected {expected[1]}: truncated"
    if whole and checksum(store.fetch(weights)) != expected[0]:
        return f"{shown} is corrupt: its checksum is not the one in {sidecar.name}"
    return None
