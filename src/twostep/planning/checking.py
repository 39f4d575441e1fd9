"""What comes due every few turns: validation, and the sample sheet's pictures."""

from __future__ import annotations

import torch

from twostep.distill.objectives.roles import Roles
from twostep.families.family import PromptBatch
from twostep.method.rollout import euler, two_step
from twostep.method.schedule import Schedule
from twostep.models.codec import Decoder
from twostep.models.folder import ModelFolder
from twostep.models.velocity import bind, guided_field
from twostep.planning.turns import Counted
from twostep.planning.weightless import CPU, make_fake, vae_without_weights
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import Placement
from twostep.runtime.images import pictures_at_once
from twostep.runtime.memory_meter import live_bytes


def count_validation(
    recipe: Recipe, folder: ModelFolder, roles: Roles, *, schedule: Schedule, prompt_tokens: int
) -> Counted:
    """A batch of it: the teacher's steps, the student's two, the teacher's look at both."""
    height, width = recipe.data.height, recipe.data.width
    count = min(pictures_at_once(height, width), recipe.training.validation_samples)
    features = folder.family.caption_width(folder.architecture)
    prompts = PromptBatch.collate([torch.randn(prompt_tokens, features)] * count, CPU)
    noise = torch.randn(count, *folder.space.shape(height, width))
    scale = recipe.teacher.guidance_scale
    taps = (roles.teacher.model.depth // 2,)
    with (
        torch.no_grad(),
        live_bytes() as live,
        torch.autocast("cpu", torch.bfloat16, recipe.training.autocast),
    ):
        # Each of the teacher's steps takes what the next one takes.
        euler(guided_field(roles.teacher, prompts, prompts, scale), noise, schedule.sigmas(1))
        two_step(bind(roles.first, prompts), bind(roles.second, prompts), noise, schedule)
        seen = roles.teacher(noise, torch.ones(count), prompts, taps).hidden[0].double()
        torch.cat([seen.mean(1), seen.std(1)], dim=1)
    return Counted(live.peak, live.operations // count)


def count_forward(
    recipe: Recipe, folder: ModelFolder, roles: Roles, *, size: tuple[int, int], prompt_tokens: int
) -> Counted:
    """One sample once through the frozen teacher."""
    features = folder.family.caption_width(folder.architecture)
    prompts = PromptBatch.collate([torch.randn(prompt_tokens, features)], CPU)
    noise = torch.randn(1, *folder.space.shape(*size))
    with (
        torch.no_grad(),
        live_bytes() as live,
        torch.autocast("cpu", torch.bfloat16, recipe.training.autocast),
    ):
        roles.teacher(noise, torch.ones(1), prompts)
    return Counted(live.peak, live.operations)


def count_decoding(
    folder: ModelFolder, size: tuple[int, int], count: int, placement: Placement
) -> tuple[int, Counted]:
    """The decoder's weights, and what decoding `count` pictures of `size` brings."""
    vae = vae_without_weights(folder)
    make_fake(vae, placement.dtype)
    decoder = Decoder(vae)
    weights = sum(p.nbytes for p in vae.parameters())
    with torch.no_grad(), live_bytes() as live:
        decoder.decode(torch.randn(count, *folder.space.shape(*size)))
    return weights, Counted(live.peak, live.operations // count)
