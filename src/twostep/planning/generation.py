"""What generating needs in memory, worked out without weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from twostep.families.family import PromptBatch
from twostep.method.rollout import two_step
from twostep.models.adapters import AdapterVelocity, SharedBackbone
from twostep.models.codec import Decoder
from twostep.models.fp8 import pack_fp8
from twostep.models.int8 import pack_int8
from twostep.models.student import STEPS
from twostep.models.velocity import Velocity, bind
from twostep.planning.teaching import text_encoder_of
from twostep.planning.weightless import (
    load_weightless,
    make_fake,
    open_weightless,
    vae_without_weights,
)
from twostep.recipe.models import Student
from twostep.runtime.devices import Memory
from twostep.runtime.memory_meter import live_bytes, weight_bytes
from twostep.runtime.shape_tensors import ShapesOnly

Steps = Literal["two_sets", "lora"]


@dataclass(frozen=True)
class GenerationNeeds:
    """Bytes on the device.

    Attributes:
        text_encoder: alone there while prompts are encoded, then gone.
        transformers: both steps' weights.
        decoder: the VAE's weights.
        steps, decoding: what comes alive at the peak of each, beside the weights.
    """

    text_encoder: int
    transformers: int
    decoder: int
    steps: int
    decoding: int

    @property
    def peak(self) -> int:
        """Without what the device needs for itself."""
        working = self.transformers + self.decoder + max(self.steps, self.decoding)
        return max(self.text_encoder, working)

    def as_json(self) -> dict[str, int]:
        return asdict(self) | {"peak": self.peak}


def generation_needs(
    model: str,
    steps: Steps,
    memory: Memory,
    size: tuple[int, int],
    *,
    batch_size: int = 1,
    prompt_tokens: int = 128,
    rank: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> GenerationNeeds:
    """Needs of a two-step student of `model`'s shape.

    Args:
        steps: two sets of weights, or two LoRA files on one.
        size: (height, width) in pixels.
        rank: of the LoRA files.
        dtype: of all weights and activations; what `memory` packs, it packs from this.

    Raises:
        ModelError: if there is no such model.
        ValueError: for a size that it does not take.
    """
    folder = open_weightless(model)
    shape = (batch_size, *folder.space.shape(*size))
    width = folder.family.caption_width(folder.architecture)
    parts = _parts(model, steps, memory=memory, rank=rank, dtype=dtype)
    with torch.no_grad(), ShapesOnly():
        prompts = PromptBatch.collate([torch.randn(prompt_tokens, width)] * batch_size)
        noise = torch.randn(shape)
        with live_bytes() as rolling:
            first, second = (bind(velocity, prompts) for velocity in parts.steps)
            two_step(first, second, noise, folder.schedule())
        with live_bytes() as decoding:
            parts.decoder.decode(noise)
        return GenerationNeeds(
            text_encoder=parts.text_encoder,
            transformers=parts.transformers,
            decoder=weight_bytes(parts.decoder.vae),
            steps=rolling.peak,
            decoding=decoding.peak,
        )


@dataclass(frozen=True)
class _Parts:
    """A student without weights; bytes of its text encoder and transformers."""

    steps: tuple[Velocity, Velocity]
    decoder: Decoder
    text_encoder: int
    transformers: int


@lru_cache(maxsize=1)
def _parts(model: str, steps: Steps, *, memory: Memory, rank: int, dtype: torch.dtype) -> _Parts:
    """Made once for all batch sizes."""
    folder = open_weightless(model)
    # On the meta device first: what shapes alone begin as stays on its device.
    networks = [
        load_weightless(folder, "transformer", dtype) for _ in range(1 + (steps == "two_sets"))
    ]
    with torch.device("meta"):
        first, second = _steps(networks, rank)
    vae = vae_without_weights(folder)
    with torch.no_grad(), ShapesOnly():
        text_encoder = weight_bytes(text_encoder_of(folder, dtype))
        for network in networks:
            make_fake(network, dtype)
            if memory == "int8":
                pack_int8(network)
            if memory == "fp8":
                pack_fp8(network, dtype)
        held = weight_bytes(*networks)
        if memory == "offload":
            held = _largest_neighbours(networks[0])
        make_fake(vae, dtype)
    return _Parts((first, second), Decoder(vae), text_encoder=text_encoder, transformers=held)


def _steps(networks: list[Any], rank: int) -> tuple[Velocity, Velocity]:
    """Both steps; of a single network, by two adapters on it."""
    if len(networks) > 1:
        return networks[0], networks[1]
    backbone = SharedBackbone(
        networks[0], STEPS, rank=rank, target_modules=Student().target_modules, seed=0
    )
    return AdapterVelocity(backbone, STEPS[0]), AdapterVelocity(backbone, STEPS[1])


def _largest_neighbours(transformer: nn.Module) -> int:
    """With offloading: a layer as it runs, and the next one on its way."""
    layers = [weight_bytes(m) for m in transformer.modules() if not any(True for _ in m.children())]
    return sum(sorted(layers)[-2:]) + sum(
        p.numel() * p.element_size() for p in transformer.parameters(recurse=False)
    )
