"""Stage `scenes`: draws the training set and encodes it once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from autoencoder import to_pixels
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from twostep.emoji.render import load_sprites, render
from twostep.emoji.scenes import CATEGORIES, RELATIONS, Category, Scene, sample_training_scene

SHARD = 2000
# How often training shows a category; binding two objects takes longest to learn.
CATEGORY_WEIGHTS: dict[Category, float] = {"single": 1, "two": 2, "counting": 2, "position": 1.5}


def encode_scenes(art: Path, work: Path, count: int, device: str) -> None:
    """Writes `work/scenes/*.safetensors`, `SHARD` scenes each; existing shards are kept."""
    sprites = load_sprites(art)
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device).eval()
    folder = work / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    shards = -(-count // SHARD)
    for index in range(shards):
        path = folder / f"{index:05d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng((2, index))
        scenes = [sample_training_scene(rng) for _ in range(SHARD)]
        drawn = [render(scene, sprites, rng) for scene in scenes]
        images = np.stack([d.image for d in drawn])
        latents = []
        for part in np.split(images, SHARD // 200):
            with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                code = vae.encode(to_pixels(part).to(device)).latent_dist.mean.float()
            latents.append((code - vae.config.shift_factor) * vae.config.scaling_factor)
        tensors = {
            "latents": torch.cat(latents).half().cpu().contiguous(),
            "occupancy": torch.from_numpy(np.stack([d.occupancy for d in drawn])),
            "scenes": torch.tensor([_to_row(s) for s in scenes], dtype=torch.int8),
        }
        save_file(tensors, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        if index % 10 == 0:
            rate = (index + 1) * SHARD / (time.monotonic() - started)
            print(f"scenes {index + 1}/{shards} shards, {rate:.0f} scenes/s", flush=True)


class Scenes:
    """The encoded training set, in memory."""

    def __init__(self, work: Path) -> None:
        parts = [load_file(p) for p in sorted((work / "scenes").glob("*.safetensors"))]
        if not parts:
            raise FileNotFoundError(f"no scenes in {work / 'scenes'}: run stage `scenes` first")
        self.latents = torch.cat([p["latents"] for p in parts])
        self.occupancy = torch.cat([p["occupancy"] for p in parts])
        self.rows = torch.cat([p["scenes"] for p in parts])
        first, second = self.rows[:, 0], self.rows[:, 1]
        category = torch.zeros(len(first), dtype=torch.long)
        category[second >= 0] = CATEGORIES.index("counting")
        category[(second >= 0) & (second != first)] = CATEGORIES.index("two")
        category[self.rows[:, 4] >= 0] = CATEGORIES.index("position")
        self._members = [torch.nonzero(category == c)[:, 0] for c in range(len(CATEGORIES))]

    def __len__(self) -> int:
        return len(self.latents)

    def scene(self, index: int) -> Scene:
        return _from_row(self.rows[index].tolist())

    def draw(self, count: int, rng: np.random.Generator) -> Tensor:
        """Indices of `count` random scenes, harder categories more often."""
        share = np.array([CATEGORY_WEIGHTS[c] for c in CATEGORIES])
        chosen = rng.choice(len(CATEGORIES), size=count, p=share / share.sum())
        members = [self._members[c] for c in chosen]
        return torch.stack([m[rng.integers(len(m))] for m in members])

    def captions(self, indices: Tensor, rng: np.random.Generator) -> list[str]:
        """A caption each: 2 in 5 Chinese, 1 in 10 without its background, 1 in 10 empty."""
        texts = []
        for index in indices.tolist():
            dice = rng.random(3)
            if dice[0] < 0.1:
                texts.append("")
                continue
            language = "zh" if dice[1] < 0.4 else "en"
            texts.append(self.scene(index).caption(language, name_background=dice[2] >= 0.1))
        return texts


def _to_row(scene: Scene) -> list[int]:
    objects = [*scene.objects, -1, -1][:3]
    relation = -1 if scene.relation is None else RELATIONS.index(scene.relation)
    return [*objects, scene.background, relation]


def _from_row(row: list[int]) -> Scene:
    *objects, background, relation = row
    return Scene(
        tuple(o for o in objects if o >= 0),
        background,
        None if relation < 0 else RELATIONS[relation],
    )
