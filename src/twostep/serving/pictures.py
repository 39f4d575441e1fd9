"""Pixels to the bytes of a file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from twostep.serving.jobs import Pixels
from twostep.serving.requests import OutputFormat

_QUALITY = 90


def encode_picture(
    pixels: Pixels,
    output_format: OutputFormat,
    *,
    compression: int | None = None,
    facts: Mapping[str, str] | None = None,
) -> bytes:
    """A file's bytes.

    Args:
        compression: quality of jpeg and webp, 0 to 100.
        facts: what a PNG says of itself, as text chunks.
    """
    options: dict[str, Any] = {}
    if output_format == "png":
        info = PngInfo()
        for key, value in (facts or {}).items():
            info.add_itxt(key, value)
        options = {"pnginfo": info, "compress_level": 3}
    else:
        options = {"quality": _QUALITY if compression is None else compression}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=output_format.upper(), **options)
    return file.getvalue()


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
