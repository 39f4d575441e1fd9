"""What generating needs in memory, worked out without weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel

from twostep.families.zimage import PromptBatch, ZImageVelocity
from twostep.inference.sampler import Field, bind
from twostep.method.flow import sigma_schedule
from twostep.method.rollout import TwoStep, two_step
from twostep.models.adapters import SharedBackbone
from twostep.models.folder import (
    Decoder,
    LatentSpace,
    read_architecture,
    read_shift,
)
from twostep.models.int8 import Memory, pack_int8, transformer_of
from twostep.models.lora_pair import STEPS, AdapterField
from twostep.planning.weightless import load_nothing, make_fake, shape_folder
from twostep.recipe.schema import (
    Student,
)
from twostep.runtime.memory_meter import held_bytes, live_bytes

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
    folder = shape_folder(model)
    shape = (batch_size, *LatentSpace.of_folder(folder).shape(*size))
    width = int(read_architecture(folder)["cap_feat_dim"])
    # On the meta device first: what fake tensors begin as stays on its device.
    shapes = [load_nothing(folder, "transformer", dtype) for _ in range(1 + (steps == "two_sets"))]
    with torch.device("meta"):
        fields = _steps(shapes, rank)
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")).eval()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        for field in shapes:
            make_fake(field, dtype)
            if memory == "int8":
                pack_int8(field.transformer)
        held = held_bytes(*(transformer_of(field) for field in fields))
        if memory == "offload":
            held = _largest_neighbours(transformer_of(fields[0]))
        prompts = PromptBatch.collate([torch.randn(prompt_tokens, width)] * batch_size)
        schedule = TwoStep(sigma_schedule(2, read_shift(folder))[1])
        noise = torch.randn(shape)
        with live_bytes() as rolling:
            two_step(bind(fields[0], prompts), bind(fields[1], prompts), noise, schedule)
        make_fake(vae, dtype)
        decoder = Decoder(vae)
        with live_bytes() as decoding:
            decoder.decode(noise)
        return GenerationNeeds(
            _text_encoder_bytes(folder, dtype),
            held,
            held_bytes(decoder.vae),
            rolling.peak,
            decoding.peak,
        )


def _steps(shapes: list[ZImageVelocity], rank: int) -> tuple[Field, Field]:
    """Both steps; of a single model, by two adapters on it."""
    if len(shapes) > 1:
        return shapes[0], shapes[1]
    backbone = SharedBackbone(shapes[0], list(STEPS), rank, Student().target_modules, 0)
    return AdapterField(backbone, STEPS[0]), AdapterField(backbone, STEPS[1])


def _largest_neighbours(transformer: nn.Module) -> int:
    """With offloading: a layer as it runs, and the next one on its way."""
    layers = [held_bytes(m) for m in transformer.modules() if not any(True for _ in m.children())]
    return sum(sorted(layers)[-2:]) + sum(
        p.numel() * p.element_size() for p in transformer.parameters(recurse=False)
    )


def _text_encoder_bytes(folder: Path, dtype: torch.dtype) -> int:
    values = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        return held_bytes(AutoModel.from_config(config)) // 4 * dtype.itemsize
