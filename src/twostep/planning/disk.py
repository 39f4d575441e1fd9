"""Bytes on disk: the teacher's cache, a checkpoint, a student; and the memory they pass through."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from twostep.data.cache.spec import recipe_schedule
from twostep.exports.comfyui import to_comfyui
from twostep.models.folder import ModelFolder
from twostep.planning.roles import RolePlan
from twostep.planning.teaching import text_encoder_of
from twostep.planning.weightless import load_weightless, make_fake, vae_without_weights
from twostep.recipe.schema import Recipe
from twostep.runtime.memory_meter import live_bytes, weight_bytes

# A student's transformers are written in bf16.
STORED = torch.bfloat16


def cache_bytes(recipe: Recipe, folder: ModelFolder, prompt_tokens: float) -> int:
    """Tensors of the teacher's cache; headers and records come on top, some kB a file.

    Args:
        prompt_tokens: of a caption, on average.
    """
    sizes, prompts = recipe.data.sizes, recipe.data.prompt_count
    samples = prompts * recipe.data.samples_per_prompt
    per_size, larger = divmod(prompts, len(sizes))
    numbers = sum(
        (per_size + (place < larger)) * math.prod(folder.space.shape(*size))
        for place, size in enumerate(sizes)
    )
    numbers *= recipe.data.samples_per_prompt
    # Where the student's second level is one of the teacher's, the latents there are kept too.
    on_grid = recipe_schedule(recipe, folder).place_of_step2(recipe.teacher.steps) is not None
    features = folder.family.caption_width(folder.architecture)
    embeds = getattr(torch, recipe.teacher.dtype).itemsize * prompt_tokens * features
    per_file = max(1, recipe.data.samples_per_file // recipe.data.samples_per_prompt)
    files = sum(-(-(per_size + (p < larger)) // per_file) for p in range(len(sizes)))
    return int(4 * numbers * (1 + on_grid) + 8 * (samples + prompts + files) + prompts * embeds)


def part_bytes(folder: ModelFolder, part: str) -> int:
    """Of `text_encoder` or `vae` on disk: the files that are there, else all numbers in bf16."""
    files = list((folder.base / part).glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files)
    model = vae_without_weights(folder) if part == "vae" else text_encoder_of(folder, STORED)
    return sum(p.numel() for p in model.parameters()) * STORED.itemsize


def pair_bytes(held: Sequence[RolePlan]) -> int:
    """A student of two adapters in fp32; one for both steps is written twice."""
    steps = [role.parameters for role in held if role.name in ("first", "second")]
    return 4 * 2 * sum(steps) // len(steps)


def student_bytes(folder: ModelFolder) -> int:
    """A student's folder: two transformers in bf16, and copies of the teacher's other parts."""
    transformer = weight_bytes(load_weightless(folder, "transformer", STORED))
    return 2 * transformer + part_bytes(folder, "text_encoder") + part_bytes(folder, "vae")


def comfyui_host_bytes(folder: ModelFolder) -> int:
    """Of the CPU's memory: a transformer, and what is new in the other layout."""
    transformer = load_weightless(folder, "transformer", STORED)
    make_fake(transformer)
    with live_bytes() as live:
        converted = to_comfyui(transformer.state_dict())
    del converted
    return weight_bytes(transformer) + live.peak
