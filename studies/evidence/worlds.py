"""A seed's world: its own prompts, teacher's images, rendered images and fitted scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rows import EXTERNAL, Row

from twostep.data.cache.build import open_cache
from twostep.emoji.art import fetch_art
from twostep.emoji.render import load_sprites, render
from twostep.emoji.scenes import training_scenes
from twostep.recipe.schema import Recipe
from twostep.runtime.files import write_text

BASE = Path(__file__).parent / "recipe.yaml"
# The scores that are fitted to the teacher's images, and how.
FITS: dict[str, tuple[str, ...]] = {"fitted": ()}
_FIT = ("training.batch_size=16", "training.turns=1", "training.critic_warmup_turns=0")
# The world in which rows are tuned; no seed's.
TUNING = 1000


@dataclass(frozen=True)
class World:
    """Attributes:
    seed: of everything in it.
    common: recipe overrides for all runs of the study.
    """

    seed: int
    out: Path
    common: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.out / "worlds" / str(self.seed)

    @property
    def external(self) -> Path:
        return self.folder / "rendered"

    def _own(self) -> tuple[str, ...]:
        cache = f"data.cache={self.folder}/cache"
        return f"data.seed={self.seed}", f"training.seed={self.seed}", cache

    def recipe(self, row: Row, name: str, tuned: Sequence[str] = ()) -> Recipe:
        """A row's in this world; later overrides win.

        Args:
            name: of the run.
            tuned: what tuning found, or a trial.
        """
        base = Recipe.load(BASE, self.common)
        turns = max(1, round(base.training.turns * row.turns))
        score = [f"score.model={self.folder}/{row.score}/score"] if row.score else []
        changes = [c.replace(EXTERNAL, str(self.external)) for c in row.changes]
        return Recipe.load(BASE, [
            *self.common, *self._own(), *score, *changes, *tuned,
            f"training.turns={turns}", f"losses.warmup_turns={turns if row.regression else 0}",
            f"training.validate_every={turns}", f"training.sample_every={turns}",
            f"name={name}", f"output={self.out}/runs",
        ])  # fmt: skip

    def fit(self, name: str, turns: int) -> Recipe:
        """The run that fits the score `name`."""
        return Recipe.load(BASE, [
            *self.common, *self._own(), *_FIT, *FITS[name], f"score.fit_turns={turns}",
            f"name={name}", f"output={self.folder}",
        ])  # fmt: skip

    def make(self, *, art: Path) -> None:
        """Teaches and draws what is not there yet."""
        recipe = self.fit(next(iter(FITS)), 1)
        open_cache(recipe)
        if not (self.external / "metadata.jsonl").exists():
            self._draw(recipe, art)

    def _draw(self, recipe: Recipe, art: Path) -> None:
        """Renders each of the world's prompts once, as imagefolder has them."""
        sprites = load_sprites(fetch_art(art))
        self.external.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((11, self.seed))
        lines = []
        # As many as `load_prompts` draws, in its order and its languages.
        scenes = training_scenes(2 * recipe.data.prompt_count + 64, self.seed)
        seen: set[str] = set()
        for index, scene in enumerate(scenes):
            caption = scene.caption("zh" if index % 3 == 2 else "en")
            if caption in seen or len(seen) == recipe.data.prompt_count:
                continue
            seen.add(caption)
            name = f"{len(seen):05d}.png"
            Image.fromarray(render(scene, sprites, rng).image).save(self.external / name)
            lines.append(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False))
        write_text(self.external / "metadata.jsonl", "\n".join(lines) + "\n")
