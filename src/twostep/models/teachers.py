"""The teacher that two LoRA files belong to: by its name, or by what a folder holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from twostep.errors import ModelError
from twostep.models.locate import WEIGHTS, Hub, locate
from twostep.models.student_index import StudentIndex
from twostep.runtime.checksums import folder_fingerprint
from twostep.runtime.known_folders import recall, remember


def find_teacher(
    folder: Path, index: StudentIndex, patterns: Sequence[str] = WEIGHTS, hub: Hub | None = None
) -> Path:
    """The teacher's folder of a student of two LoRA files.

    `zoo:NAME` and ids of the hub are what they say. A folder is looked for beside the student's, as
    the recipe of the run around it names it, and where this machine last saw its content.

    Raises:
        ModelError: if it is in none of these places.
    """
    assert index.teacher is not None
    if index.teacher_sha256 is None:
        return locate(index.teacher, patterns, hub or Hub())
    others = []
    for place in _places(folder, index.teacher, index.teacher_sha256):
        with suppress(OSError):
            if (place / "model_index.json").is_file():
                if folder_fingerprint(place) == index.teacher_sha256:
                    remember(index.teacher_sha256, place)
                    return place
                others.append(str(place))
    said = f"; {' and '.join(others)} is another one" if others else ""
    raise ModelError(
        f"{folder}: its teacher is the folder {index.teacher!r} (sha256 "
        f"{index.teacher_sha256[:12]}), which is not on this machine{said}. "
        f"Put it, or a link to it, at {folder.parent / index.teacher}"
    )


def _places(folder: Path, teacher: str, sha256: str) -> Iterator[Path]:
    yield folder.absolute().parent / teacher
    known = recall(sha256)
    if known is not None:
        yield known
    with suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError):
        recipe = yaml.safe_load((folder.parent / "recipe.yaml").read_text(encoding="utf-8"))
        yield Path(str(recipe["teacher"]["model"])).expanduser()
