"""Latents to images and back: the folder's VAE, or a tiny decoder for the same latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from twostep.errors import ModelError
from twostep.families.loading import load_diffusers
from twostep.models.foreign import named
from twostep.models.tiny_decoders import tiny_folder
from twostep.runtime.images import pictures_at_once

# One picture of 1024 x 1024, which takes about 2 GB in bf16 on its way through the VAE.
_PIXELS_AT_ONCE = 1024 * 1024


@dataclass(frozen=True)
class Decoder:
    """Latents to images through the folder's VAE, or a tiny one made for the same latents."""

    vae: Any

    @staticmethod
    def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
        with named(folder / "vae"):
            vae = load_diffusers(AutoencoderKL, folder, "vae", dtype)
        return Decoder(vae.eval())

    @staticmethod
    def load_tiny(name: str, like: Decoder, dtype: torch.dtype = torch.float32) -> Decoder:
        """An `AutoencoderTiny`: a folder, `zoo:NAME` or a hub id (`madebyollin/taef1` for Z-Image).

        Args:
            like: whose latents it must read.

        Raises:
            ModelError: if there is none, or it is made for other latents.
        """
        folder = tiny_folder(name)
        with named(folder):
            tiny = Decoder(load_diffusers(AutoencoderTiny, folder, None, dtype))
        shapes = [(d.vae.config.latent_channels, d.scale) for d in (tiny, like)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"decoder: {name} reads latents of {shapes[0][0]} channels at 1/{shapes[0][1]}, "
                f"the model's have {shapes[1][0]} at 1/{shapes[1][1]}"
            )
        tiny.vae.eval()
        return tiny

    @property
    def scale(self) -> int:
        """Pixels per latent, along each side."""
        config = self.vae.config
        stages = getattr(config, "block_out_channels", None) or config.decoder_block_out_channels
        return int(2 ** (len(stages) - 1))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) latents to (B, 3, scale * H, scale * W) images in -1..1, fp32.

        On the decoder's device, as many at once as its memory is likely to hold.
        """
        config = self.vae.config
        images = []
        for part in latents.split(self._at_once(*latents.shape[2:])):
            part = (
                part.to(self.vae.device, self.vae.dtype) / config.scaling_factor
                + config.shift_factor
            )
            images.append(self.vae.decode(part, return_dict=False)[0].float().clamp(-1, 1))
        return torch.cat(images).contiguous()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Inverse of `decode`, the posterior's mode; fp32."""
        config = self.vae.config
        latents = []
        height, width = (side // self.scale for side in images.shape[2:])
        for part in images.split(self._at_once(height, width)):
            code = self.vae.encode(part.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
            latents.append(((code - config.shift_factor) * config.scaling_factor).float())
        return torch.cat(latents)

    def _at_once(self, height: int, width: int) -> int:
        """Latents of `height` x `width` in a batch: at full size their channels are many."""
        sides = height * self.scale, width * self.scale
        return pictures_at_once(*sides, pixels=_PIXELS_AT_ONCE)
