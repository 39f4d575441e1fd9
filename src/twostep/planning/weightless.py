"""Models without weights, and batches without data, in the shapes of a recipe."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from twostep.distill.objectives.turns import Batch
from twostep.families.zimage import PromptBatch, ZImageVelocity
from twostep.models.folder import (
    LatentSpace,
    read_architecture,
    resolve,
    unloaded_transformer,
)
from twostep.recipe.schema import (
    Recipe,
)

CONFIGURATIONS = Path(__file__).parent / "configurations"
# Models whose shape is known without asking the hub.
_KNOWN = {"Tongyi-MAI/Z-Image-Turbo": "z-image-turbo", "Tongyi-MAI/Z-Image": "z-image-turbo"}
CPU = torch.device("cpu")


def shape_folder(model: str) -> Path:
    """A folder with at least the configurations of `model`; weights are not fetched.

    Raises:
        ModelError: if there is none, here or on the hub.
    """
    if model in _KNOWN:
        return CONFIGURATIONS / _KNOWN[model]
    return resolve(model, patterns=("*.json",))


def load_nothing(folder: Path, part: str, dtype: torch.dtype) -> ZImageVelocity:
    """The folder's transformer on the meta device."""
    with torch.device("meta"):
        transformer = unloaded_transformer(folder, part, dtype)
    return ZImageVelocity(transformer).eval()


def make_fake(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Fake tensors on the CPU for the module's weights: unlike meta tensors they autocast.

    Args:
        dtype: of all parameters; each keeps its own if None.
    """
    for owner in module.modules():
        for name, packed in owner.named_buffers(recurse=False):
            if not isinstance(packed, FakeTensor):
                setattr(owner, name, torch.empty(packed.shape, dtype=packed.dtype, device=CPU))
        for name, parameter in owner.named_parameters(recurse=False):
            if not isinstance(parameter, FakeTensor):
                fake = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device=CPU)
                setattr(owner, name, nn.Parameter(fake, parameter.requires_grad))


def random_batch(
    recipe: Recipe,
    folder: Path,
    rows: int,
    prompt_tokens: int,
    device: torch.device = CPU,
) -> Batch:
    """A batch of noise in the shape that the turns on the recipe's largest size have."""
    height, width = max(recipe.data.sizes, key=math.prod)
    shape = (rows, *LatentSpace.of_folder(folder).shape(height, width))
    features = int(read_architecture(folder)["cap_feat_dim"])
    prompts = PromptBatch.collate([torch.randn(prompt_tokens, features)] * rows, device)
    latents = torch.randn(shape, device=device)
    return Batch(latents, latents, latents, latents, prompts, prompts, prompts)


def cache_bytes(recipe: Recipe, folder: Path, prompt_tokens: int) -> int:
    """Bytes of the teacher's cache on disk."""
    space = LatentSpace.of_folder(folder)
    sizes = recipe.data.sizes
    latents = sum(math.prod(space.shape(*size)) for size in sizes) // len(sizes)
    features = int(read_architecture(folder)["cap_feat_dim"])
    prompts = recipe.data.prompt_count
    # Latents at the end and, where the student's second level is the teacher's, on the way.
    return 4 * prompts * (2 * latents * recipe.data.samples_per_prompt + prompt_tokens * features)
