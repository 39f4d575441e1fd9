"""Tensors to pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

_GAP = 2


def to_bytes(images: Tensor) -> Tensor:
    """Images in -1..1, of any shape, to uint8 on CPU; what is outside is clipped."""
    return images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 to an RGB picture."""
    return Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy())


def image_grid(panels: dict[str, Tensor], scale: int = 2) -> Image.Image:
    """One row per panel, each (K, 3, H, W) in -1..1; column k is the k-th image of every panel."""
    rows = [[np.asarray(to_pil(image)) for image in images] for images in panels.values()]
    height, width, _ = rows[0][0].shape
    columns = max(len(row) for row in rows)
    grid = np.full(
        (len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8
    )
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * (height + _GAP), c * (width + _GAP)
            grid[top : top + height, left : left + width] = image
    picture = Image.fromarray(grid)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
