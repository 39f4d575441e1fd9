"""What every model is asked for: prompts, seeds, and the scenes behind the embedded world's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from twostep.data.prompts import load_prompts
from twostep.emoji.scenes import Scene, held_out_scenes
from twostep.method.rollout import seeded_noise
from twostep.runtime.randomness import Stream, seeds_of


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and seeds for two disjoint sets of images of them.

    Images come seed by seed: image `s * len(prompts) + p` is the s-th of prompt p.

    Attributes:
        prompts: distinct ones.
        scenes: what each prompt asks for, if the inspector can judge it; else None.
        seeds_per_prompt: images of each prompt in a set.
        seed: what the images' own seeds follow from.
    """

    prompts: list[str]
    scenes: list[Scene] | None
    seeds_per_prompt: int
    seed: int = 0

    @staticmethod
    def load(source: str, images: int, seeds_per_prompt: int = 2, seed: int = 0) -> PromptSet:
        """`images` images at most, a multiple of `seeds_per_prompt`.

        Args:
            source: `emoji`, scenes that no training showed, or what `load_prompts` takes.

        Raises:
            PromptError: for a file that cannot be used.
            ValueError: if `images` does not suffice for two prompts.
        """
        count = images // seeds_per_prompt
        if count < 2:
            raise ValueError(
                f"images: {images} images of {seeds_per_prompt} seeds each are fewer than two "
                "prompts"
            )
        if source != "emoji":
            found = load_prompts(source, count, seed=seed, option="--prompts")
            return PromptSet(found, None, seeds_per_prompt, seed)
        scenes = held_out_scenes(count, seed)
        # Categories come in turn of four: the language changes every four.
        prompts = [s.caption("zh" if i // 4 % 2 else "en") for i, s in enumerate(scenes)]
        return PromptSet(prompts, scenes, seeds_per_prompt, seed)

    def first(self) -> PromptSet:
        """One image of the first prompt."""
        return PromptSet(self.prompts[:1], self.scenes and self.scenes[:1], 1, self.seed)

    def __len__(self) -> int:
        """Images in a set."""
        return len(self.prompts) * self.seeds_per_prompt

    @property
    def captions(self) -> list[str]:
        """One per image."""
        return self.prompts * self.seeds_per_prompt

    @property
    def groups(self) -> Tensor:
        """(images,) int64, which images share a prompt."""
        return torch.arange(len(self.prompts)).repeat(self.seeds_per_prompt)

    def noise_seeds(self, reference: bool = False) -> list[int]:
        """One seed per image; the reference set has seeds of its own."""
        found = seeds_of(self.seed, Stream.EVALUATION_NOISE, 2 * len(self))
        return found[len(self) :] if reference else found[: len(self)]

    def noise(self, rows: slice, shape: tuple[int, int, int], reference: bool = False) -> Tensor:
        """Initial noise of some images, (rows, C, H, W)."""
        return seeded_noise(self.noise_seeds(reference)[rows], shape)

    @property
    def fingerprint(self) -> str:
        """Changes with the prompts or the seeds."""
        parts = [self.prompts, self.seeds_per_prompt, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
