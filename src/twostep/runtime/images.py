"""Tensors to pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Of one batch through a transformer: four pictures of 1024 x 1024.
_PIXELS_AT_ONCE, _MOST_AT_ONCE = 4 * 1024 * 1024, 64
_GAP = 2
# Small pictures are enlarged until their shorter side has about this many pixels.
_SHOWN_SIDE = 128


def pictures_at_once(height: int, width: int, *, pixels: int = _PIXELS_AT_ONCE) -> int:
    """How many pictures of `height` x `width` make a batch of about `pixels`; 1 to 64.

    A transformer is busy with four large pictures, and a larger batch only takes memory.
    """
    return max(1, min(_MOST_AT_ONCE, pixels // (height * width)))


def to_bytes(images: Tensor) -> Tensor:
    """Images in -1..1, of any shape, to uint8 on CPU; what is outside is clipped."""
    return images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 to an RGB picture."""
    return Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy())


def tile(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows, on white."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    size = (columns * (width + _GAP) - _GAP, len(rows) * (height + _GAP) - _GAP)
    grid = Image.new("RGB", size, "white")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            grid.paste(image, (c * (width + _GAP), r * (height + _GAP)))
    return grid


def image_grid(panels: dict[str, Tensor], scale: int = 2) -> Image.Image:
    """One row per panel, each (K, 3, H, W) in -1..1; column k is the k-th image of every panel."""
    picture = tile([[to_pil(image) for image in images] for images in panels.values()])
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)


def labelled_rows(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """A row of pictures under each label; small ones are enlarged."""
    first = next(iter(rows.values()))[0]
    scale = max(1, round(_SHOWN_SIDE / min(first.size)))
    font = ImageFont.load_default(size=14)
    line = 22
    strips = []
    for images in rows.values():
        strip = tile([images])
        size = (strip.width * scale, strip.height * scale)
        strips.append(strip.resize(size, Image.Resampling.BICUBIC) if scale > 1 else strip)
    width = max(max(s.width for s in strips), *(int(font.getlength(label)) + 8 for label in rows))
    page = Image.new("RGB", (width, sum(s.height + line for s in strips)), "white")
    draw, top = ImageDraw.Draw(page), 0
    for label, strip in zip(rows, strips, strict=True):
        draw.text((4, top + 2), label, fill="black", font=font)
        page.paste(strip, (0, top + line))
        top += line + strip.height
    return page
