"""What each turn is given: samples of the cache, and the critic's reals."""

from __future__ import annotations

from pathlib import Path

import torch

from twostep.data.cache.read import TeacherCache
from twostep.data.real_images import ExternalReals
from twostep.distill.held_out import HeldOut
from twostep.distill.objectives.batch import Batch
from twostep.distill.order import Order
from twostep.errors import RecipeError
from twostep.families.family import PromptBatch
from twostep.recipe.schema import Recipe, Training
from twostep.runtime.devices import Placement
from twostep.runtime.distributed import World


def divide_batch(batch_size: int, *, processes: int, micro_batch: int | None) -> tuple[int, int]:
    """The samples of each process, and of each of its micro-batches.

    Raises:
        RecipeError: if the batch cannot be divided so.
    """
    own, rest = divmod(batch_size, processes)
    if rest or not own:
        raise RecipeError(
            f"training.batch_size: {batch_size} cannot be divided among {processes} processes"
        )
    size = min(micro_batch or own, own)
    if own % size:
        raise RecipeError(
            f"training.micro_batch: {micro_batch} does not divide the {own} samples of each "
            f"process (training.batch_size {batch_size}, {processes} processes)"
        )
    return own, size


def rows_of(settings: Training, world: World) -> list[slice]:
    """This process's rows of a batch, as equal micro-batches.

    Raises:
        RecipeError: if the batch cannot be divided so.
    """
    own, size = divide_batch(
        settings.batch_size, processes=world.size, micro_batch=settings.micro_batch
    )
    first = world.rank * own
    return [slice(i, i + size) for i in range(first, first + own, size)]


def order_of(recipe: Recipe, cache: TeacherCache) -> Order:
    """The order in which a run reads `cache`; validation's prompts are left out."""
    return Order(
        HeldOut.of(recipe, cache.spec).training_samples(),
        cache.caption_lengths(),
        seed=recipe.training.seed,
        window=recipe.data.caption_window,
        files=cache.files_at_once(),
    )


class Batches:
    """The batches of a run, on `device`; a batch is a function of its number and purpose."""

    def __init__(self, recipe: Recipe, cache: TeacherCache, device: torch.device) -> None:
        self.size, self.seed = recipe.training.batch_size, recipe.training.seed
        self.cache, self.device = cache, device
        self.order = order_of(recipe, cache)
        self.reals: dict[tuple[int, ...], ExternalReals] = {}
        self.pairs_by_prompt = recipe.critic.paired
        if recipe.data.reals != "teacher":
            placement = Placement(device, getattr(torch, recipe.teacher.dtype))
            for size in recipe.data.sizes:
                external = ExternalReals(
                    Path(recipe.data.reals), cache.spec.teacher, size, placement=placement
                )
                self.reals[external.latents.shape[1:]] = external
        self.empty = PromptBatch.collate([cache.empty_embeds], device)

    def read(self, number: int, purpose: str, rows: slice | None = None) -> Batch:
        """The rows of one batch; all of them if None. Each purpose has an order of its own."""
        rows = rows or slice(0, self.size)
        samples = self.cache.read(self.order.batch(number, self.size, purpose=purpose)[rows])
        if self.cache.spec.store.is_remote:
            self.cache.ahead(self.order.batch(number + 1, self.size, purpose=purpose)[rows])
        latents = samples.latents.to(self.device)
        prompts = PromptBatch.collate(samples.embeds, self.device)
        reals, real_prompts = latents, prompts
        if self.reals:
            external = self.reals[latents.shape[1:]]
            shown = samples.prompts if self.pairs_by_prompt else None
            reals, embeds = external.draw(number, self.size, seed=self.seed, rows=rows, shown=shown)
            reals = reals.to(self.device)
            if embeds is not None:
                real_prompts = PromptBatch.collate(embeds, self.device)
        trajectory = samples.trajectory
        return Batch(
            noise=samples.noise.to(self.device),
            latents=latents,
            trajectory=None if trajectory is None else trajectory.to(self.device),
            reals=reals,
            real_prompts=real_prompts,
            prompts=prompts,
            empty=self.empty.expand(len(latents)),
        )
