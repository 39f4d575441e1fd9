"""Draws an emoji scene: objects of random size, place and tilt on a coloured gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from twostep.emoji.scenes import BACKGROUND_NAMES, BACKGROUNDS, OBJECTS, Scene

IMAGE_SIZE = 64
# Object size as a fraction of the canvas, by how many objects the scene has.
_SIZE_RANGE = {1: (0.42, 0.72), 2: (0.36, 0.46), 3: (0.30, 0.38)}
_MAX_TILT_DEGREES = 15.0


@dataclass(frozen=True)
class Rendering:
    """A drawn scene and its ground truth.

    Attributes:
        image: uint8 (IMAGE_SIZE, IMAGE_SIZE, 3), sRGB.
        centres: float32 (objects, 2), x and y in 0..1.
        occupancy: uint8 (IMAGE_SIZE // 8, IMAGE_SIZE // 8); 0 is background, k is object k - 1.
    """

    image: np.ndarray
    centres: np.ndarray
    occupancy: np.ndarray


@lru_cache(maxsize=2)
def load_sprites(folder: Path) -> tuple[Image.Image, ...]:
    """The objects' pictures, 128x128 RGBA, from an unpacked `@lobehub/fluent-emoji-3d`.

    Raises:
        FileNotFoundError: when an object's picture is missing from `folder`.
    """
    sprites = []
    for emoji in OBJECTS:
        path = folder / f"{emoji.code}.webp"
        if not path.is_file():
            raise FileNotFoundError(f"no picture of {emoji.name!r}: expected {path}")
        sprites.append(
            Image.open(path).convert("RGBA").resize((128, 128), Image.Resampling.LANCZOS)
        )
    return tuple(sprites)


def render(scene: Scene, sprites: tuple[Image.Image, ...], rng: np.random.Generator) -> Rendering:
    """Draws `scene` with a random layout taken from `rng`."""
    canvas = _gradient(BACKGROUNDS[BACKGROUND_NAMES[scene.background]], rng)
    size, centres = _layout(scene, rng)
    side = int(size)
    coverage = np.zeros((len(OBJECTS) + 1, IMAGE_SIZE // 8, IMAGE_SIZE // 8), np.float32)
    coverage[0] = 0.25  # an object owns a cell once it covers a quarter of it
    for index, (x, y) in zip(scene.objects, centres, strict=True):
        sprite = sprites[index].resize((side, side), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tilt = rng.uniform(-_MAX_TILT_DEGREES, _MAX_TILT_DEGREES)
        sprite = sprite.rotate(tilt, Image.Resampling.BILINEAR)
        corner = (int(x - side / 2), int(y - side / 2))
        canvas.alpha_composite(sprite, corner)
        alpha = Image.new("L", canvas.size)
        alpha.paste(sprite.getchannel("A"), corner)
        cells = np.asarray(alpha, np.float32).reshape(IMAGE_SIZE // 8, 8, IMAGE_SIZE // 8, 8)
        coverage[index + 1] += cells.mean((1, 3)) / 255
    return Rendering(
        image=np.asarray(canvas.convert("RGB")),
        centres=(centres / IMAGE_SIZE).astype(np.float32),
        occupancy=coverage.argmax(0).astype(np.uint8),
    )


def _gradient(colour: tuple[int, int, int], rng: np.random.Generator) -> Image.Image:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / IMAGE_SIZE - 0.5
    slope = (np.cos(angle) * x + np.sin(angle) * y)[..., None] * rng.uniform(0, 60)
    pixels = np.asarray(colour, float) + slope + rng.uniform(-10, 10)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert("RGBA")


def _layout(scene: Scene, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """One size for all objects and their centres in pixels; objects do not overlap."""
    count = len(scene.objects)
    while True:
        size = rng.uniform(*_SIZE_RANGE[count]) * IMAGE_SIZE
        nearest, farthest = size / 2 + 1, IMAGE_SIZE - size / 2 - 1
        if scene.category == "counting":
            centres = _ring(count, rng)
        else:
            centres = rng.uniform(nearest, farthest, (count, 2))
        inside = nearest <= centres.min() and centres.max() <= farthest
        apart = all(
            np.abs(centres[i] - centres[j]).max() > 0.95 * size
            for i in range(count)
            for j in range(i)
        )
        if inside and apart and _holds(scene, centres, size):
            return size, centres


def _ring(count: int, rng: np.random.Generator) -> np.ndarray:
    """Centres spread about the middle of the canvas, at any turn, as people group equal things."""
    turns = np.arange(count) / count + rng.uniform() + rng.uniform(-0.04, 0.04, count)
    radius = rng.uniform(0.22, 0.36, (count, 1)) * IMAGE_SIZE
    middle = IMAGE_SIZE / 2 + rng.uniform(-3, 3, 2)
    directions = np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], 1)
    return np.asarray(middle + radius * directions)


def _holds(scene: Scene, centres: np.ndarray, size: float) -> bool:
    """Whether two different objects lie as the caption says.

    "A dog and a cat" names them in reading order: the first lies further up or left. Were either
    order drawn, a few-step model would often make both the same object (docs/log.md, 2026-11-23).
    """
    if scene.category not in ("two", "position"):
        return True
    dx, dy = centres[0] - centres[1]
    if scene.relation is None:
        return bool(-dx - dy > 0.5 * size)
    return bool(
        {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[scene.relation] > 0.9 * size
    )
