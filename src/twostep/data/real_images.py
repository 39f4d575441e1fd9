"""External images as the critic's reals: the ablation of distribution-aligned learning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from twostep.data.prompt_text import PromptError, lines_of
from twostep.errors import RecipeError
from twostep.models.folder import ModelFolder
from twostep.runtime.devices import Placement
from twostep.runtime.randomness import Stream, rng

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_DECODED = 500


class ExternalReals:
    """A folder of images, encoded once through the teacher's VAE and text encoder.

    Captions come from `metadata.jsonl` in the folder, an object a line with `file_name` and `text`
    (the layout of Hugging Face's imagefolder). Without that file the critic judges the images
    under the student's prompts.

    Args:
        folder: images, read at any depth; each is resized and cropped to the wanted size.
        teacher: whose encoders are used.
        size: (height, width) in pixels.
        placement: of the encoders while they work.

    Attributes:
        latents: (N, C, H, W), fp32.
        embeds: N caption embeddings (tokens, D); None without captions.

    Raises:
        RecipeError: if the folder holds no image, one cannot be read, or one has no caption.
    """

    def __init__(
        self, folder: Path, teacher: ModelFolder, size: tuple[int, int], *, placement: Placement
    ) -> None:
        paths = _images(folder)
        captions = _captions(folder, paths)
        decoder = teacher.decoder(placement)
        latents = []
        for start in range(0, len(paths), 64):
            images = [_read(path, size) for path in paths[start : start + 64]]
            latents.append(decoder.encode(torch.stack(images)).cpu())
        self.latents = torch.cat(latents)
        self.embeds: list[Tensor] | None = None
        self._of_caption: dict[str, list[int]] = {}
        for place, caption in enumerate(captions or ()):
            self._of_caption.setdefault(caption, []).append(place)
        if captions is not None:
            encoder = teacher.encoder(placement, cache_size=0)
            self.embeds = [e.cpu() for e in encoder.encode(captions)]

    def draw(
        self,
        number: int,
        count: int,
        *,
        seed: int,
        rows: slice | None = None,
        shown: Sequence[str] | None = None,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Latents (count, C, H, W) and their captions' embeddings, for batch `number` of a run.

        Args:
            count: of the whole batch.
            rows: those of it that are wanted; all if None.
            shown: the prompt of each wanted row, which its image is to show if any does.
        """
        generator = rng(seed, Stream.EXTERNAL_REALS, number)
        picks = generator.integers(len(self.latents), size=count)[rows or slice(None)].tolist()
        for row, prompt in enumerate(shown or ()):
            fitting = self._of_caption.get(prompt)
            if fitting:
                picks[row] = fitting[picks[row] % len(fitting)]
        embeds = None if self.embeds is None else [self.embeds[i] for i in picks]
        return self.latents[picks], embeds


def check_reals(folder: Path) -> None:
    """Looks at every image's head and at the captions; decodes the first images alone.

    Raises:
        RecipeError: as `ExternalReals`.
    """
    paths = _images(folder)
    _captions(folder, paths)
    for number, path in enumerate(paths):
        if number < _DECODED:
            _read(path, (8, 8))
            continue
        try:
            with Image.open(path):
                pass
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise RecipeError(f"data.reals: {path} cannot be read as an image") from error


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise RecipeError(f"data.reals: no images in {str(folder)!r}, which is no folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not paths:
        raise RecipeError(f"data.reals: no images (png, jpg, webp) in {str(folder)!r}")
    return paths


def _captions(folder: Path, paths: list[Path]) -> list[str] | None:
    """One caption per image, or None if the folder has no `metadata.jsonl`."""
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        return None
    texts: dict[str, str] = {}
    try:
        lines = list(lines_of(listing))
    except PromptError as error:
        raise RecipeError(f"data.reals: {error}") from error
    for number, line in lines:
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            texts[str(entry["file_name"])] = str(entry["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RecipeError(
                f"data.reals: {listing}:{number}: expected an object with file_name and text"
            ) from error
    names = [path.relative_to(folder).as_posix() for path in paths]
    for name in names:
        if name not in texts:
            raise RecipeError(f"data.reals: {listing} has no caption for {name!r}")
    return [texts[name] for name in names]


def _read(path: Path, size: tuple[int, int]) -> Tensor:
    """(3, H, W) in -1..1, centre-cropped."""
    height, width = size
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RecipeError(f"data.reals: {path} cannot be read as an image") from error
    scale = max(height / rgb.height, width / rgb.width)
    resized = rgb.resize(
        (max(width, round(rgb.width * scale)), max(height, round(rgb.height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    pixels = np.asarray(resized.crop((left, top, left + width, top + height)), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)
