"""Whether folders can be written, keep apart and have room, before anything is."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twostep.errors import RecipeError
from twostep.runtime.files import free_bytes

# Added to a name while a file is written: dots, host, process, number.
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Need:
    """Bytes that a setting's folder will hold in the end."""

    option: str
    folder: Path
    size: int


def check_place(folder: Path, option: str) -> None:
    """Whether a folder is there and can be written, or can be made.

    Raises:
        RecipeError: naming `option`, for a file in the way, missing rights or a name too long.
    """
    too_long = [part for part in folder.parts if len(os.fsencode(part)) > _LONGEST_NAME]
    if too_long or len(os.fsencode(folder.absolute())) > 4000:
        raise RecipeError(
            f"{option}: a name of more than {_LONGEST_NAME} bytes: {str(folder)[:80]!r}..."
        )
    if any("\0" in part for part in folder.parts):
        raise RecipeError(f"{option}: a path must not hold NUL characters")
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            if place.is_dir():
                break
            if place.exists() or place.is_symlink():
                raise RecipeError(f"{option}: {place} is a file, a folder is needed there")
        except OSError as error:
            raise RecipeError(f"{option}: {place}: {error.strerror}") from error
    if not os.access(place, os.W_OK | os.X_OK):
        raise RecipeError(f"{option}: {place} cannot be written")


def check_apart(folder: Path, option: str, other: Path, *, inside_only: bool = False) -> None:
    """Raises RecipeError if one folder lies within another that will be replaced.

    Args:
        inside_only: `other` may lie within `folder`.
    """
    one, two = folder.resolve(), other.resolve()
    if one.is_relative_to(two) or (not inside_only and two.is_relative_to(one)):
        raise RecipeError(
            f"{option}: {folder} and {other} lie within each other; one would overwrite the other"
        )


def check_space(needs: Sequence[Need]) -> None:
    """Raises RecipeError where a disk has too little room for all that will lie on it.

    What a folder holds already counts as there.
    """
    on_disk: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        device = _device(need.folder)
        if device is not None:
            on_disk[device].append(need)
    for some in on_disk.values():
        missing = sum(max(0, need.size - _held(need.folder)) for need in some)
        free = free_bytes(some[0].folder)
        if free is not None and missing > free:
            names = " and ".join(f"{need.option} ({need.folder})" for need in some)
            raise RecipeError(
                f"{names}: about {missing / 2**30:.2f} GiB will be written, "
                f"{free / 2**30:.2f} GiB are free there"
            )


def _device(folder: Path) -> int | None:
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            return place.stat().st_dev
        except OSError:
            continue
    return None


def _held(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            total += path.lstat().st_size
        except OSError:
            continue
    return total
