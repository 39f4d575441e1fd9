"""External images for the critic: rendered scenes with their captions, as imagefolder has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from twostep.emoji.art import fetch_art
from twostep.emoji.render import load_sprites, render
from twostep.emoji.scenes import training_scenes
from twostep.recipe.schema import Recipe
from twostep.runtime.files import write_text


def draw_scenes(folder: Path, recipe: Recipe) -> None:
    """Writes as many scenes as the recipe has prompts, with those prompts; needs npm once."""
    if (folder / "metadata.jsonl").exists():
        return
    sprites = load_sprites(fetch_art(folder.parent))
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((11, recipe.data.seed))
    lines = []
    scenes = training_scenes(recipe.data.prompt_count, recipe.data.seed)
    for index, scene in enumerate(scenes):
        name = f"{index:05d}.png"
        Image.fromarray(render(scene, sprites, rng).image).save(folder / name)
        caption = scene.caption("zh" if index % 3 == 2 else "en")
        lines.append(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False))
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
