"""The teacher's samples: the prompts through the text encoder, then noise through the teacher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from twostep.families.family import PromptBatch
from twostep.method.rollout import euler
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.models.prompt_encoder import PromptEncoder
from twostep.models.velocity import guided_field
from twostep.planning.stages import Stage
from twostep.planning.weightless import CPU, load_weightless, make_fake
from twostep.recipe.schema import Recipe
from twostep.runtime.images import pictures_at_once
from twostep.runtime.memory_meter import live_bytes, weight_bytes


class _Words:
    """A tokenizer that makes every prompt as long."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return str(messages[0]["content"])

    def __call__(self, texts: list[str], **_: Any) -> Any:
        ids: Tensor = torch.ones(len(texts), self.tokens, dtype=torch.int64)
        batch = SimpleNamespace(input_ids=ids, attention_mask=ids)
        batch.to = lambda device: batch
        return batch


def text_encoder_of(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """The text encoder, on the meta device."""
    config = AutoConfig.for_model(**folder.config("text_encoder"))
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def encoding_stage(
    recipe: Recipe, folder: ModelFolder, prompt_tokens: int, *, disk: int = 0
) -> Stage:
    """The prompts, with nothing but the text encoder there."""
    model = text_encoder_of(folder, getattr(torch, recipe.teacher.dtype))
    make_fake(model)
    count = min(64, recipe.data.prompt_count)
    with live_bytes() as live:
        PromptEncoder(_Words(prompt_tokens), model).encode([str(i) for i in range(count)], count)
    held = weight_bytes(model)
    return Stage("teach: prompts", held + live.peak, disk=disk, operations=live.operations // count)


def sampling_stage(
    recipe: Recipe, folder: ModelFolder, schedule: Schedule, prompt_tokens: int, *, disk: int = 0
) -> Stage:
    """Noise to pictures, as many at once as the cache's builder takes."""
    height, width = max(recipe.data.sizes, key=lambda s: pictures_at_once(*s) * s[0] * s[1])
    per_file = recipe.data.samples_per_file
    count = min(pictures_at_once(height, width), per_file)
    network = load_weightless(folder, "transformer", getattr(torch, recipe.teacher.dtype))
    make_fake(network)
    features = folder.family.caption_width(folder.architecture)
    dtype = getattr(torch, recipe.teacher.dtype)
    embeds = torch.randn(prompt_tokens, features, dtype=dtype)
    prompts = PromptBatch.collate([embeds] * count, CPU)
    noise = torch.randn(count, *folder.space.shape(height, width))
    scale, steps = recipe.teacher.guidance_scale, recipe.teacher.steps
    with torch.no_grad(), live_bytes() as live:
        # Two steps: each takes what the next one takes.
        euler(guided_field(network, prompts, prompts, scale), noise, schedule.sigmas(2))
    return Stage(
        "teach: pictures",
        weight_bytes(network) + live.peak,
        disk=disk,
        operations=live.operations * steps // (2 * count),
    )
