"""Pictures on disk as the benchmarks' own scorers read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from twostep.runtime.files import make_folder, write_atomically, write_text


@dataclass(frozen=True)
class Item:
    """A prompt of a benchmark.

    Attributes:
        place: of its pictures, relative and without ending; `{model}` stands for the model's name.
        facts: what the scorer wants to know again.
    """

    prompt: str
    place: str
    facts: Mapping[str, Any] = field(default_factory=dict)


# (an item's pictures in the order of the seeds, its place, item) -> files written
Layout = Callable[[Sequence[Image.Image], Path, Item], None]


def geneval(pictures: Sequence[Image.Image], place: Path, item: Item) -> None:
    """A folder for each prompt with its line of metadata and the samples."""
    make_folder(place / "samples")
    write_text(place / "metadata.jsonl", json.dumps(dict(item.facts)))
    for number, picture in enumerate(pictures):
        _save(picture, place / "samples" / f"{number:04d}.png")


def numbered(pictures: Sequence[Image.Image], place: Path, item: Item) -> None:
    """`PLACE.png` for a single picture, else `PLACE_1.png`, `PLACE_2.png` and on."""
    if len(pictures) == 1:
        _save(pictures[0], place.with_name(f"{place.name}.png"))
        return
    for number, picture in enumerate(pictures, start=1):
        _save(picture, place.with_name(f"{place.name}_{number}.png"))


def grid(ending: str) -> Layout:
    """Four pictures as a square, row by row, in one file; WebP at Pillow's usual quality, as the
    official script writes it."""

    def write(pictures: Sequence[Image.Image], place: Path, item: Item) -> None:
        width, height = pictures[0].size
        side = 1 if len(pictures) == 1 else 2
        page = Image.new("RGB", (side * width, side * height))
        for number, picture in enumerate(pictures[: side * side]):
            page.paste(picture, (number % side * width, number // side * height))
        _save(page, place.with_name(f"{place.name}.{ending}"))

    return write


def _save(picture: Image.Image, path: Path) -> None:
    make_folder(path.parent)
    kind = {"png": "PNG", "webp": "WEBP"}[path.suffix.removeprefix(".")]
    write_atomically(path, lambda p: picture.save(p, format=kind))
