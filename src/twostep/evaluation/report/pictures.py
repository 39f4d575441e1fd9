"""The page's pictures: their data, their words, and where each leads to."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from twostep.runtime.images import to_pil

# Enlarged they fill a phone; up to _LOSSLESS they are as they were made, beyond it nearly so.
_LONGEST_SIDE, _LOSSLESS = 512, 256


@dataclass(frozen=True)
class Pair:
    """Two pictures side by side, (3, H, W) in -1..1.

    Attributes:
        seed: of the noise.
        note: what there is to say of the two.
    """

    caption: str
    left: Tensor
    right: Tensor
    seed: int | None = None
    note: str = ""


@dataclass(frozen=True)
class PictureGroup:
    """Pictures behind some figures.

    Attributes:
        figures: keys of the figures that link here, such as `accuracy`.
        lead: says what stands left and right.
    """

    figures: tuple[str, ...]
    title: str
    lead: str
    pairs: Sequence[Pair]

    @property
    def anchor(self) -> str:
        """Its place in the page."""
        return "worst-" + re.sub(r"[^a-z]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Shot:
    """A picture that can be enlarged: its place, address, words, and the one that comes next."""

    anchor: str
    source: str
    about: str
    language: str
    next: str = ""


def picture_rows(
    panels: Mapping[str, Tensor], captions: Sequence[str], seeds: Sequence[int] | None
) -> dict[str, list[Shot]]:
    """Every row's pictures; each leads on to the one below it."""
    rows = {}
    for row, (label, images) in enumerate(panels.items()):
        below = (row + 1) % len(panels)
        rows[label] = [
            Shot(
                f"picture-{row}-{column}",
                _data_uri(image),
                _about(label, captions[column], seeds[column] if seeds else None),
                language=language_of(captions[column]),
                next=f"picture-{below}-{column}",
            )
            for column, image in enumerate(images)
        ]
    return rows


def picture_pairs(group: PictureGroup) -> list[tuple[Pair, str, list[Shot]]]:
    """Each pair, its language and its two pictures, which lead on to each other."""
    found = []
    for number, pair in enumerate(group.pairs):
        names = [f"{group.anchor}-{number}-{side}" for side in ("left", "right")]
        language = language_of(pair.caption)
        shots = [
            Shot(
                names[i], _data_uri(image), _about(side, pair.caption, pair.seed),
                language=language, next=names[1 - i],
            )
            for i, (side, image) in enumerate((("left", pair.left), ("right", pair.right)))
        ]  # fmt: skip
        found.append((pair, language, shots))
    return found


def _about(label: str, caption: str, seed: int | None) -> str:
    """What is said of a picture where the pointer rests on it, and where it is enlarged."""
    return f"{label}: {caption}" + ("" if seed is None else f" (seed {seed})")


def _data_uri(image: Tensor) -> str:
    picture, buffer = to_pil(image), io.BytesIO()
    if max(picture.size) <= _LOSSLESS:
        kind = "png"
        picture.save(buffer, format="PNG", optimize=True)
    else:
        kind = "webp"
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        picture.save(buffer, format="WEBP", quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def language_of(caption: str) -> str:
    return "zh" if any("\u4e00" <= character <= "\u9fff" for character in caption) else "en"
