"""Models without weights, and batches without data, in the shapes of a recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from twostep.distill.objectives.batch import Batch
from twostep.families.family import PromptBatch
from twostep.models.folder import ModelFolder
from twostep.models.foreign import named
from twostep.models.locate import CONFIGURATIONS as CONFIGURATION_FILES
from twostep.recipe.schema import Recipe
from twostep.runtime.shape_tensors import ShapeTensor

CONFIGURATIONS = Path(__file__).parent / "configurations"
# Models whose shape is known without asking the hub.
_KNOWN = {"Tongyi-MAI/Z-Image-Turbo": "z-image-turbo", "Tongyi-MAI/Z-Image": "z-image-turbo"}
CPU = torch.device("cpu")


def open_weightless(model: str) -> ModelFolder:
    """A folder with at least the configurations of `model`; weights are not fetched.

    Raises:
        ModelError: if there is none, here or on the hub.
    """
    known = _KNOWN.get(model)
    if known is not None:
        return ModelFolder.open(CONFIGURATIONS / known)
    return ModelFolder.open(model, CONFIGURATION_FILES)


def load_weightless(folder: ModelFolder, part: str, dtype: torch.dtype) -> Any:
    """The folder's network on the meta device."""
    with named(folder.base / part):
        return folder.family.without_weights(folder.base, part, dtype)


def vae_without_weights(folder: ModelFolder) -> Any:
    """The folder's VAE on the meta device."""
    with torch.device("meta"), named(folder.base / "vae"):
        config = AutoencoderKL.load_config(folder.base, subfolder="vae")
        return AutoencoderKL.from_config(config, trust_remote_code=False).eval()


def make_fake(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Weights without values, inside `ShapesOnly`; unlike meta tensors they autocast.

    Args:
        dtype: of all parameters; each keeps its own if None.
    """
    for owner in module.modules():
        for name, packed in owner.named_buffers(recurse=False):
            if not isinstance(packed, ShapeTensor):
                setattr(owner, name, torch.empty(packed.shape, dtype=packed.dtype, device=CPU))
        for name, parameter in owner.named_parameters(recurse=False):
            if not isinstance(parameter, ShapeTensor):
                fake = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device=CPU)
                setattr(owner, name, nn.Parameter(fake, parameter.requires_grad))


def random_batch(
    recipe: Recipe,
    folder: ModelFolder,
    *,
    rows: int,
    prompt_tokens: int,
    device: torch.device = CPU,
) -> Batch:
    """A batch of noise in the shape that the turns on the recipe's largest size have."""
    height, width = max(recipe.data.sizes, key=math.prod)
    shape = (rows, *folder.space.shape(height, width))
    features = folder.family.caption_width(folder.architecture)
    prompts = PromptBatch.collate([torch.randn(prompt_tokens, features)] * rows, device)
    latents = torch.randn(shape, device=device)
    return Batch(
        noise=latents, latents=latents, trajectory=latents, reals=latents,
        real_prompts=prompts, prompts=prompts, empty=prompts,
    )  # fmt: skip
