"""Pictures from prompts, as PNG files that say how they were made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from twostep.backbones.model import MAX_PIXELS
from twostep.errors import UserError
from twostep.pictures import to_pil
from twostep.rollout import seeded_noise
from twostep.sampler import Sampler


class InputError(UserError, ValueError):
    """An argument that cannot be used; the message names it."""


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "SIDE" or "WIDTHxHEIGHT".

    Raises:
        InputError: for anything else, or more than `MAX_PIXELS`.
    """
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match:
        raise InputError(f"size: expected SIDE or WIDTHxHEIGHT in pixels, got {text!r}")
    width = int(match[1])
    height = int(match[2] or width)
    if width * height > MAX_PIXELS:
        raise InputError(f"size: at most {MAX_PIXELS} pixels, {text!r} has {width * height}")
    return height, width


def generate(
    prompts: Sequence[str],
    model: str,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    size: tuple[int, int] = (64, 64),
    count: int = 1,
) -> Iterator[Path]:
    """Writes `count` pictures per prompt, with seeds from `seed` up, and yields their paths.

    Raises:
        InputError, ModelError: before any picture is made.
    """
    if not all(p.strip() for p in prompts):
        raise InputError("prompt: must not be empty")
    sampler = Sampler.load(model)
    try:
        shape = sampler.noise_shape(*size)
    except ValueError as error:
        raise InputError(f"size: {error}") from error
    if sampler.schedule is not None and steps not in (None, 2):
        raise InputError(f"steps: {model} is a two-step student, got {steps}")
    seeds = list(range(seed, seed + count))
    out.mkdir(parents=True, exist_ok=True)
    used = 2 if sampler.schedule is not None else steps or 8
    for prompt in prompts:
        images = sampler.generate([prompt] * count, seeded_noise(seeds, shape), steps)
        for number, image in zip(seeds, images, strict=True):
            info = PngInfo()
            facts = {"prompt": prompt, "seed": number, "steps": used, "model": model}
            for key, value in facts.items():
                info.add_itxt(key, str(value))
            path = out / f"{_slug(prompt)}-{number}-{used}steps.png"
            temporary = path.with_suffix(".tmp")
            to_pil(image).save(temporary, format="PNG", pnginfo=info)
            os.replace(temporary, path)
            yield path


def _slug(prompt: str) -> str:
    """A file name from a prompt; word characters of any script are kept."""
    return re.sub(r"\W+", "-", prompt).strip("-")[:60] or "picture"
