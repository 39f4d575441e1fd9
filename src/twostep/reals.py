"""External images as the critic's reals: the ablation of distribution-aligned learning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from twostep.backbones.model import Decoder
from twostep.config import RecipeError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class ExternalReals:
    """A folder of images, encoded once through the teacher's VAE.

    Args:
        folder: images, read at any depth; each is resized and cropped to the wanted size.
        size: (height, width) in pixels.

    Raises:
        RecipeError: if the folder holds no image, or one cannot be read.
    """

    def __init__(self, folder: Path, decoder: Decoder, size: tuple[int, int]) -> None:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not paths:
            raise RecipeError(f"data.reals: no images (png, jpg, webp) in {str(folder)!r}")
        latents = []
        for start in range(0, len(paths), 64):
            images = [_read(path, size) for path in paths[start : start + 64]]
            latents.append(decoder.encode(torch.stack(images)))
        self.latents = torch.cat(latents)

    def draw(self, number: int, count: int) -> Tensor:
        """Latents (count, C, H, W), a function of `number`."""
        picks = np.random.default_rng((5, number)).integers(len(self.latents), size=count)
        return self.latents[torch.from_numpy(picks)]


def _read(path: Path, size: tuple[int, int]) -> Tensor:
    """(3, H, W) in -1..1, centre-cropped."""
    height, width = size
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except OSError as error:
        raise RecipeError(f"data.reals: {path} cannot be read as an image") from error
    scale = max(height / rgb.height, width / rgb.width)
    resized = rgb.resize(
        (max(width, round(rgb.width * scale)), max(height, round(rgb.height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    pixels = np.asarray(resized.crop((left, top, left + width, top + height)), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)
