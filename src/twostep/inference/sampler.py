"""Generates from any folder: a teacher at N Euler steps, or a two-step student. The fast path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twostep.errors import ModelError
from twostep.families.zimage import PromptBatch, ZImageVelocity
from twostep.method.flow import sigma_schedule
from twostep.method.rollout import TwoStep, VelocityField, euler, guided, two_step
from twostep.models.folder import (
    Decoder,
    LatentSpace,
    PromptEncoder,
    load_velocity,
    locate,
    read_index,
    read_shift,
    resolve,
)
from twostep.models.int8 import Memory, hold, transformer_of
from twostep.models.lora_pair import AdapterField, LoraPair
from twostep.runtime.files import folder_fingerprint

Field = ZImageVelocity | AdapterField


def bind(field: Field, prompts: PromptBatch) -> VelocityField:
    """`field` with its prompts fixed."""
    return lambda latents, sigma: field(latents, sigma, prompts).velocity


def read_two_step(folder: Path) -> TwoStep | None:
    """A student folder's schedule, from its own `model_index.json`; None for a teacher.

    Raises:
        ModelError: if the folder has a second transformer but no schedule for it.
    """
    index = read_index(folder)
    if "transformer_2" not in index:
        return None
    if "step2_sigma" not in index:
        raise ModelError(f"{folder}/model_index.json has transformer_2 but no step2_sigma")
    return TwoStep(float(index["step2_sigma"]), index.get("transition", "euler"))


@dataclass(frozen=True)
class Sample:
    """Generated latents (B, C, H, W), and for a student what step 1 already pointed to."""

    latents: Tensor
    preview: Tensor | None


def read_schedule(model: str) -> TwoStep | None:
    """The schedule of a student, two transformers or two LoRA files; None for a teacher.

    Raises:
        ModelError: if there is no such model, or it cannot be used.
    """
    pair = LoraPair.read(locate(model))
    return read_two_step(resolve(model)) if pair is None else pair.schedule


def base_folder(model: str) -> Path:
    """The diffusers folder of everything but a student's LoRA files: for most, the model itself.

    Raises:
        ModelError: if there is none.
    """
    pair = LoraPair.read(locate(model))
    return resolve(model if pair is None else pair.teacher)


def count_steps(schedule: TwoStep | None, steps: int | None) -> int:
    """How many steps a model with `schedule` takes when asked for `steps`."""
    return 2 if schedule is not None else steps or 8


def fingerprint(model: str) -> str:
    """Changes with the model's weights, configurations or templates."""
    folder, base = locate(model), base_folder(model)
    if folder == base:
        return folder_fingerprint(folder)
    both = folder_fingerprint(folder) + folder_fingerprint(base)
    return hashlib.sha256(both.encode()).hexdigest()


class Sampler:
    """A loaded model folder.

    Args:
        field: the transformer, or the student's first.
        second: the student's second transformer; None for a model with any number of steps.
        schedule: the student's schedule; None exactly when `second` is.
        shift: time shift of the teacher's schedule.
        device: where the model computes; where its weights are if None.
    """

    def __init__(
        self,
        field: Field,
        second: Field | None,
        schedule: TwoStep | None,
        shift: float,
        encoder: PromptEncoder,
        decoder: Decoder,
        device: torch.device | None = None,
    ) -> None:
        self.field, self.second, self.schedule, self.shift = field, second, schedule, shift
        self.encoder, self.decoder = encoder, decoder
        self.device = device or next(field.parameters()).device

    @staticmethod
    def load(
        model: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory: Memory = "plain",
        tiny_decoder: str | None = None,
        encoder: PromptEncoder | None = None,
    ) -> Sampler:
        """From a folder, `zoo:NAME` or a hub id; a folder of two LoRA files names its teacher.

        Args:
            memory: how the transformers' weights are held (`memory.py`).
            tiny_decoder: an `AutoencoderTiny` in the VAE's place.
            encoder: one that encoded the prompts already, in place of the model's own.

        Raises:
            ModelError: if the folder is missing or is not a model of this family.
        """
        device, folder = torch.device(device), locate(model)
        pair = LoraPair.read(folder)
        fields: tuple[Field, ...]
        if pair is not None:
            schedule: TwoStep | None = pair.schedule
            fields = pair.load(folder, dtype)
            folder = resolve(pair.teacher)
        else:
            folder = resolve(model)
            schedule = read_two_step(folder)
            parts = ("transformer", "transformer_2") if schedule else ("transformer",)
            fields = tuple(load_velocity(folder, part, dtype) for part in parts)
        hold(fields, memory, device)
        decoder = Decoder.load(folder, dtype)
        if tiny_decoder is not None:
            decoder = Decoder.load_tiny(tiny_decoder, decoder, dtype)
        # Convolutions are faster so, on a CPU too.
        decoder.vae.to(device, memory_format=torch.channels_last)
        if encoder is None:
            encoder = PromptEncoder.load(folder, dtype).to(device)
        second = fields[1] if len(fields) > 1 else None
        return Sampler(fields[0], second, schedule, read_shift(folder), encoder, decoder, device)

    def compile(self) -> None:
        """Compiles transformers and decoder: the first picture of a size and batch takes long."""
        self.field.compile(dynamic=False)
        if self.second is not None:
            self.second.compile(dynamic=False)
        self.decoder.vae.decoder.compile(dynamic=False)

    def modules(self) -> list[nn.Module]:
        """Everything that runs between a prompt and its picture."""
        found = [self.encoder.text_encoder, self.field, self.second, self.decoder.vae]
        return [module for module in found if module is not None]

    def count_steps(self, steps: int | None) -> int:
        """How many steps `sample` takes when asked for `steps`."""
        return count_steps(self.schedule, steps)

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the noise for a `height` x `width` image; ValueError for a bad size."""
        config: Any = transformer_of(self.field).config
        return LatentSpace.of(config, self.decoder.scale).shape(height, width)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        steps: int | None = None,
        guidance_scale: float = 0.0,
        batch_size: int = 64,
    ) -> Sample:
        """Latents for `prompts` from `noise` (len(prompts), C, H, W).

        Args:
            steps: for a teacher, Euler steps (8 if None); a student takes only 2.
            guidance_scale: for a teacher; 0 is none.

        Raises:
            ValueError: mismatched counts, or steps and guidance that the model does not take.
        """
        if len(prompts) != len(noise):
            raise ValueError(f"{len(prompts)} prompts but noise for {len(noise)} images")
        if self.schedule is not None and (steps not in (None, 2) or guidance_scale):
            raise ValueError(
                f"a two-step student takes steps=2 and guidance_scale=0, "
                f"got steps={steps}, guidance_scale={guidance_scale}"
            )
        latents, previews = [], []
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            batch = PromptBatch.collate(self.encoder.encode(texts), self.device)
            part = noise[start : start + batch_size].to(self.device)
            sample = self.roll(batch, part, steps, guidance_scale)
            latents.append(sample.latents)
            if sample.preview is not None:
                previews.append(sample.preview)
        return Sample(torch.cat(latents), torch.cat(previews) if previews else None)

    @torch.no_grad()
    def roll(
        self,
        prompts: PromptBatch,
        noise: Tensor,
        steps: int | None = None,
        guidance_scale: float = 0.0,
        around: Callable[[VelocityField], VelocityField] = lambda field: field,
    ) -> Sample:
        """One batch of `sample`, its prompts encoded and everything on the model's device.

        `around` may put something, such as a clock, around the field of every step.
        """
        first = bind(self.field, prompts)
        if self.schedule is not None:
            assert self.second is not None
            fresh = transition_noise(noise) if self.schedule.transition == "renoise" else None
            second = around(bind(self.second, prompts))
            rollout = two_step(around(first), second, noise, self.schedule, transition_noise=fresh)
            return Sample(rollout.clean2, rollout.clean1)
        unconditional = None
        if guidance_scale:
            empty = PromptBatch.collate(self.encoder.encode([""]), self.device)
            unconditional = bind(self.field, empty.expand(len(noise)))
        field = around(guided(first, unconditional, guidance_scale))
        return Sample(
            euler(field, noise, sigma_schedule(self.count_steps(steps), self.shift)), None
        )

    def generate(self, prompts: Sequence[str], noise: Tensor, steps: int | None = None) -> Tensor:
        """Images (B, 3, H, W) in -1..1."""
        return self.decoder.decode(self.sample(prompts, noise, steps).latents)


def transition_noise(noise: Tensor) -> Tensor:
    """Fresh noise for the `renoise` transition, a function of each image's own initial noise.

    So that an image depends on its seed alone, whatever batch it is in.
    """
    fresh = []
    for image in noise:
        bits = image.detach().cpu().float().contiguous().view(torch.int32)
        seed = int(bits.to(torch.int64).sum().abs().item())
        generator = torch.Generator().manual_seed(seed)
        fresh.append(torch.randn(image.shape, generator=generator))
    return torch.stack(fresh).to(noise.device)
