"""A student's two steps as two stages of a line: each holds one expert, latents pass between.

To the engine each stage is a model of one step; what the first finishes with is a `Handover`, and
what the second begins with a `HandedSpec`. A picture is the one that the whole student makes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twostep.errors import InputError
from twostep.families.family import padded_length
from twostep.models.velocity import Velocity
from twostep.serving.jobs import HandedSpec, Handover, Packed, PictureSpec
from twostep.serving.served_model import (
    HoldingOptions,
    Opened,
    PictureState,
    ServedModel,
    SharedParts,
    make_ready,
)

Part = Literal["first", "second"]


def check_split(models: Sequence[Opened]) -> None:
    """Raises InputError, naming --two-stage, for a model that is no two-step student."""
    for opened in models:
        if opened.folder.student is None:
            raise InputError(
                f"--two-stage: {opened.offer.name} has no second step of its own, "
                "expected two-step students alone"
            )


def load_part(
    models: Sequence[Opened], options: HoldingOptions, part: Part
) -> dict[str, ServedModel]:
    """Loads one expert of each student, and makes a first batch with it.

    The first stage holds the text encoder and, for previews, the VAE; the second its own VAE.
    """
    check_split(models)
    shared = SharedParts(options)
    loaded: dict[str, ServedModel] = {}
    for opened in models:
        folder = opened.folder
        steps: list[Velocity] = [_Elsewhere(), _Elsewhere()]
        index, kind = (0, FirstStage) if part == "first" else (1, SecondStage)
        steps[index] = folder.velocity(index, options.placement)
        loaded[opened.offer.name] = kind(
            shared.sampler(folder, steps), folder, steps=1, rounded=options.compiled
        )
    make_ready(models, loaded, options)
    return loaded


class _Elsewhere(nn.Module):
    """The expert that the other stage holds."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this step is made by the other stage")


class FirstStage(ServedModel):
    """Prompts and seeds to what step 2 is given, with step 1's preview."""

    def finish(self, states: Sequence[PictureState]) -> Sequence[Handover]:
        return [Handover(_pack(state.latents), _pack(state.embeds)) for state in states]


class SecondStage(ServedModel):
    """What step 1 made to pictures; never loads the text encoder."""

    def warm_up(self, size: tuple[int, int], batch: int = 1) -> None:
        width = self.folder.family.caption_width(self.folder.architecture)
        weights = self.sampler.velocities[1]
        assert isinstance(weights, nn.Module)
        latents = torch.zeros(self.sampler.noise_shape(*size))
        embeds = torch.zeros(32, width, dtype=next(weights.parameters()).dtype)
        handover = Handover(_pack(latents), _pack(embeds))
        specs = [HandedSpec("", "", seed, size, handover=handover) for seed in range(batch)]
        self.finish(self.first(specs))

    def group(self, spec: PictureSpec) -> Hashable:
        """As the first stage has it, from the embedding itself."""
        assert isinstance(spec, HandedSpec)
        return spec.size, padded_length(spec.handover.embeds[1][0])

    @torch.no_grad()
    def first(self, specs: Sequence[PictureSpec]) -> list[PictureState]:
        """Step 2."""
        states = []
        for spec in specs:
            assert isinstance(spec, HandedSpec)
            latents = _unpack(spec.handover.latents).to(self.sampler.device)
            embeds = _unpack(spec.handover.embeds).to(self.sampler.device)
            states.append(PictureState(latents, clean1=latents, embeds=embeds))
        return self.advance(states, 1)


def _pack(tensor: Tensor) -> Packed:
    plain = tensor.detach().cpu().contiguous()
    data = plain.view(torch.uint8).numpy().tobytes()
    return data, tuple(plain.shape), str(plain.dtype).removeprefix("torch.")


def _unpack(packed: Packed) -> Tensor:
    data, shape, dtype = packed
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(shape)
