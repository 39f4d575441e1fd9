"""What a teacher cache must hold: derived from the recipe alone, before any network is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from twostep.data.cache.store import Store, is_url, open_location, open_store
from twostep.data.prompts import load_prompts
from twostep.errors import RecipeError
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.recipe.fields import Size
from twostep.recipe.schema import Recipe
from twostep.runtime.randomness import Stream, torch_seed

if TYPE_CHECKING:
    from twostep.models.lora_files import LoraFile

VERSION = 1


@dataclass(frozen=True)
class Shard:
    """Samples of one size, in one file.

    Attributes:
        size: (height, width) in pixels.
        first: id of the first sample.
        prompts: samples of one prompt lie side by side.
        count: samples.
    """

    index: int
    size: Size
    first: int
    prompts: list[str]
    count: int


@dataclass(frozen=True)
class CacheSpec:
    """A cache's contents.

    Attributes:
        location: of the cache, a folder or a URL.
        copies, copies_gib: where shards of a URL's cache are kept, and how much of them.
        schedule: the recipe's noise levels.
        steps, guidance_scale, dtype: the teacher's.
        prompts: the first size's, then the second's, and so on: prompt i of the recipe's is drawn
            in size i modulo the number of sizes.
        sizes: (height, width) in pixels.
    """

    location: Path | str
    copies: Path
    copies_gib: float
    teacher: ModelFolder
    schedule: Schedule
    steps: int
    guidance_scale: float
    dtype: str
    prompts: list[str]
    sizes: tuple[Size, ...]
    samples_per_prompt: int
    seed: int
    prompts_per_shard: int

    @staticmethod
    def of(recipe: Recipe) -> CacheSpec:
        """Raises ModelError, PromptError or RecipeError for what the recipe names wrongly."""
        teacher, data = open_teacher(recipe), recipe.data
        check_sizes(recipe, teacher)
        if is_url(data.cache):
            open_location(data.cache)
        schedule = recipe_schedule(recipe, teacher)
        prompts = load_prompts(
            data.prompts,
            data.prompt_count,
            seed=data.seed,
            column=data.prompt_column,
            split=data.prompt_split,
        )
        if len(prompts) < len(data.sizes):
            raise RecipeError(
                f"data.other_sizes: {len(data.sizes)} sizes need as many prompts at least, "
                f"{data.prompts} has {len(prompts)}"
            )
        return CacheSpec(
            location=data.cache,
            copies=data.cache_copies,
            copies_gib=data.cache_copies_gib,
            teacher=teacher,
            schedule=schedule,
            steps=recipe.teacher.steps,
            guidance_scale=recipe.teacher.guidance_scale,
            dtype=recipe.teacher.dtype,
            prompts=[p for i in range(len(data.sizes)) for p in prompts[i :: len(data.sizes)]],
            sizes=data.sizes,
            samples_per_prompt=data.samples_per_prompt,
            seed=data.seed,
            prompts_per_shard=max(1, data.samples_per_file // data.samples_per_prompt),
        )

    @cached_property
    def store(self) -> Store:
        """Where its files are. Raises RecipeError for a URL that nothing here can open."""
        return open_store(
            self.location,
            copies=self.copies,
            room_gib=self.copies_gib,
            fingerprint=lambda: self.fingerprint,
        )

    @property
    def folder(self) -> Path:
        """Of its files, or of their copies."""
        return self.store.folder

    @property
    def sigmas(self) -> list[float]:
        return self.schedule.sigmas(self.steps)

    @property
    def sample_count(self) -> int:
        return len(self.prompts) * self.samples_per_prompt

    def samples_of(self, size: int) -> range:
        """Ids of the samples of a size, by its place in `sizes`."""
        per_size, larger = divmod(len(self.prompts), len(self.sizes))
        bounds = [s * per_size + min(s, larger) for s in (size, size + 1)]
        start, end = (bound * self.samples_per_prompt for bound in bounds)
        return range(start, end)

    @cached_property
    def shards(self) -> list[Shard]:
        """In the order of their sample ids."""
        found: list[Shard] = []
        for place, size in enumerate(self.sizes):
            samples = self.samples_of(place)
            per_shard = self.prompts_per_shard * self.samples_per_prompt
            for first in range(samples.start, samples.stop, per_shard):
                count = min(per_shard, samples.stop - first)
                start, end = (n // self.samples_per_prompt for n in (first, first + count))
                prompts = self.prompts[start:end]
                found.append(Shard(len(found), size, first=first, prompts=prompts, count=count))
        return found

    def noise_seed(self, sample: int) -> int:
        """Seed of a sample's initial noise."""
        return torch_seed(self.seed, Stream.CACHE_NOISE, sample)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the teacher's weights, dtype, the schedule, prompts, sizes or seeds."""
        digest = hashlib.sha256()
        step2_sigma = self.schedule.step2_sigma
        settings = [VERSION, self.sigmas, self.guidance_scale, step2_sigma, self.prompts]
        settings += [self.samples_per_prompt, *(n for size in self.sizes for n in size), self.seed]
        settings += [self.prompts_per_shard]
        if self.dtype != "float32":  # named later, so that older caches stay good
            settings.append(self.dtype)
        digest.update(json.dumps(settings).encode())
        digest.update(self.teacher.fingerprint.encode())
        return digest.hexdigest()


def open_teacher(recipe: Recipe) -> ModelFolder:
    """The recipe's teacher with its LoRA files; loads no weights of it.

    Raises:
        ModelError: for a folder or a LoRA file that is missing or does not fit, or for a student.
    """
    loras = _loras(recipe) if recipe.teacher.loras else []
    teacher = ModelFolder.open(recipe.teacher.model)
    teacher.check_teacher("teacher.model")
    return teacher.with_loras(loras)


def _loras(recipe: Recipe) -> list[LoraFile]:
    from twostep.models.lora_files import LoraFile

    return [
        LoraFile.open(lora.path, lora.scale, option=f"teacher.loras[{index}]", sha256=lora.sha256)
        for index, lora in enumerate(recipe.teacher.loras)
    ]


def check_sizes(recipe: Recipe, teacher: ModelFolder) -> None:
    """Raises RecipeError for a size or a warm-up that the teacher does not take."""
    for size in recipe.data.sizes:
        try:
            teacher.space.shape(*size)
        except ValueError as error:
            raise RecipeError(f"data.height, width or other_sizes: {error}") from error
    losses = recipe.losses
    option = "losses.step1.trajectory" if losses.step1.trajectory else ""
    if losses.warmup_step1_target == "trajectory":
        option = "losses.warmup_step1_target: trajectory"
    if option:
        _check_on_grid(recipe_schedule(recipe, teacher), recipe.teacher.steps, option)


def recipe_schedule(recipe: Recipe, teacher: ModelFolder) -> Schedule:
    """The noise levels of a recipe: what it names, else its teacher's own."""
    shift = recipe.shift or teacher.schedule((recipe.data.height, recipe.data.width)).shift
    return Schedule.of(shift, recipe.step2_sigma, recipe.student.transition)


def _check_on_grid(schedule: Schedule, steps: int, option: str) -> None:
    if schedule.place_of_step2(steps) is None:
        raise RecipeError(
            f"{option} needs step2_sigma on the teacher's "
            f"grid {schedule.sigmas(steps)}, got {schedule.step2_sigma}"
        )
