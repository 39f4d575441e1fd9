"""Generates from any folder: a teacher at N Euler steps, or a two-step student. The fast path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twostep.errors import UserError
from twostep.families.family import LatentSpace, PromptBatch
from twostep.method.rollout import euler, first_step, second_step
from twostep.method.schedule import Schedule
from twostep.models.codec import Decoder
from twostep.models.compiling import allow_graphs
from twostep.models.folder import ModelFolder
from twostep.models.prompt_encoder import PromptEncoder
from twostep.models.velocity import Velocity, bind, guided_field
from twostep.runtime.devices import Placement
from twostep.runtime.images import pictures_at_once


class NotFiniteError(UserError, RuntimeError):
    """A model that gave pictures nobody could look at."""

    exit_code = 1


def check_pictures(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Images (B, 3, H, W) of `prompts`, as they are.

    Raises:
        NotFiniteError: naming a prompt, for NaN or infinity in them.
    """
    finite = images.flatten(1).isfinite().all(1).tolist()
    bad = [prompt for prompt, good in zip(prompts, finite, strict=True) if not good]
    if bad:
        raise NotFiniteError(
            f"the model gives values that are not finite for {len(bad)} of {len(prompts)} "
            f"pictures, such as {bad[0][:60]!r}; they are not written"
        )
    return images


@dataclass(frozen=True)
class Sample:
    """Generated latents (B, C, H, W), and for a student what step 1 already pointed to."""

    latents: Tensor
    preview: Tensor | None


class Sampler:
    """A loaded model.

    Args:
        velocities: one for a model with any number of steps; a student's two.
        schedule: the model's noise levels.
        space: where its images live.
        device: where the model computes.
    """

    def __init__(
        self,
        velocities: Sequence[Velocity],
        *,
        schedule: Schedule,
        space: LatentSpace,
        encoder: PromptEncoder,
        decoder: Decoder,
        device: torch.device,
    ) -> None:
        self.velocities, self.schedule, self.space = tuple(velocities), schedule, space
        self.encoder, self.decoder, self.device = encoder, decoder, device

    @staticmethod
    def load(
        model: str | ModelFolder,
        device: torch.device | str = "cpu",
        *,
        placement: Placement | None = None,
        tiny_decoder: str | None = None,
        encoder: PromptEncoder | None = None,
    ) -> Sampler:
        """From a folder, `zoo:NAME` or a hub id; a folder of two LoRA files names its teacher.

        Args:
            device: in the type that suits it (`Placement.on`).
            placement: in place of `device`.
            tiny_decoder: an `AutoencoderTiny` in the VAE's place.
            encoder: one that encoded the prompts already, in place of the model's own.

        Raises:
            ModelError: if the folder is missing or is not a model of a known family.
        """
        folder = model if isinstance(model, ModelFolder) else ModelFolder.open(model)
        placement = placement or Placement.on(device)
        return Sampler(
            folder.velocities(placement),
            schedule=folder.schedule(),
            space=folder.space,
            encoder=encoder or folder.encoder(placement),
            decoder=folder.decoder(placement, tiny_decoder),
            device=placement.device,
        )

    @property
    def is_student(self) -> bool:
        """Whether it takes its two steps and no other number."""
        return len(self.velocities) == 2

    def compile(self) -> None:
        """Compiles transformers and decoder: the first picture of a size and batch takes long."""
        self.compile_velocities()
        self.decoder.vae.decoder.compile(dynamic=False)

    def compile_velocities(self) -> None:
        """Compiles the transformers alone, where another model's decoder is shared."""
        allow_graphs()
        for module in self.velocities:
            assert isinstance(module, nn.Module)
            module.compile(dynamic=False)

    def modules(self) -> list[nn.Module]:
        """Everything that runs between a prompt and its picture."""
        velocities = [v for v in self.velocities if isinstance(v, nn.Module)]
        return [self.encoder.text_encoder, *velocities, self.decoder.vae]

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the noise for a `height` x `width` image; ValueError for a bad size."""
        return self.space.shape(height, width)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        steps: int | None = None,
        *,
        guidance_scale: float = 0.0,
        sigmas: Sequence[float] | None = None,
    ) -> Sample:
        """Latents for `prompts` from `noise` (len(prompts), C, H, W).

        Args:
            steps: for a teacher, Euler steps (8 if None); a student takes only 2.
            guidance_scale: for a teacher; 0 is none.
            sigmas: for a teacher, the noise levels of its steps, from 1 to above 0, in place of
                its schedule's; as many as `steps`.

        Raises:
            ValueError: mismatched counts, or what the model does not take.
        """
        if len(prompts) != len(noise):
            raise ValueError(f"{len(prompts)} prompts but noise for {len(noise)} images")
        if self.is_student and (steps not in (None, 2) or guidance_scale or sigmas):
            raise ValueError(
                f"a two-step student takes steps=2, guidance_scale=0 and its own sigmas, "
                f"got steps={steps}, guidance_scale={guidance_scale}, sigmas={sigmas}"
            )
        if sigmas is not None and steps not in (None, len(sigmas)):
            raise ValueError(f"{len(sigmas)} sigmas but steps={steps}")
        latents, previews = [], []
        height, width = (side * self.space.scale for side in noise.shape[2:])
        batch_size = pictures_at_once(height, width)
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            batch = PromptBatch.collate(self.encoder.encode(texts), self.device)
            part = noise[start : start + batch_size].to(self.device)
            sample = self.roll(batch, part, steps, guidance_scale=guidance_scale, sigmas=sigmas)
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
        *,
        guidance_scale: float = 0.0,
        sigmas: Sequence[float] | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Sample:
        """One batch of `sample`, its prompts encoded and everything on the model's device.

        `on_step` is called after each step; a clock, for instance.
        """
        if self.is_student:
            first, second = (bind(velocity, prompts) for velocity in self.velocities)
            between = first_step(first, noise, self.schedule)
            on_step()
            clean2 = second_step(second, between.latents2, self.schedule)
            on_step()
            return Sample(clean2, between.clean1)
        field = guided_field(
            self.velocities[0], prompts, self._empty(guidance_scale), guidance_scale
        )
        levels = self.schedule.sigmas(steps or 8) if sigmas is None else [*sigmas, 0.0]
        return Sample(euler(field, noise, levels, lambda *_: on_step()), None)

    def _empty(self, guidance_scale: float) -> PromptBatch | None:
        """The empty prompt, encoded only where guidance asks for it."""
        if not guidance_scale:
            return None
        return PromptBatch.collate(self.encoder.encode([""]), self.device)

    def generate(self, prompts: Sequence[str], noise: Tensor, steps: int | None = None) -> Tensor:
        """Images (B, 3, H, W) in -1..1."""
        return self.decoder.decode(self.sample(prompts, noise, steps).latents)
