"""The format of a two-step student, as its folder says it: two transformers, or two LoRA files.

Two transformers: a diffusers folder whose `model_index.json` also has `transformer_2`,
`step2_sigma`, `transition` and `sizes`. Two LoRA files: `first.safetensors`, `second.safetensors`
and `twostep.json`, which names the model they belong to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from twostep.errors import ModelError
from twostep.method.schedule import Schedule
from twostep.models.foreign import read_object

LORA_INDEX = "twostep.json"
STEPS = ("first", "second")
PARTS = ("transformer", "transformer_2")
# (height, width) in pixels.
Size = tuple[int, int]


@dataclass(frozen=True)
class StudentIndex:
    """What a student's folder says of itself.

    Attributes:
        kind: two transformers, or two LoRA files.
        step2_sigma, transition: as in `Schedule`.
        teacher: of LoRA files, the model that they belong to: `zoo:NAME`, a hub id, or the last
            name of a folder.
        teacher_sha256: of such a folder, its fingerprint. Files of earlier versions hold its path.
        sizes: of the pictures that it was made for, (height, width) in pixels, the usual one first;
            earlier versions did not say.
    """

    kind: Literal["student", "lora_pair"]
    step2_sigma: float
    transition: Any
    teacher: str | None = None
    teacher_sha256: str | None = None
    sizes: tuple[Size, ...] = ()

    @staticmethod
    def read(folder: Path) -> StudentIndex | None:
        """None if the folder is no student.

        Raises:
            ModelError: if it is one, but its index cannot be used or a file is missing.
        """
        path = folder / LORA_INDEX
        if path.is_file():
            return _read_lora_index(path)
        path = folder / "model_index.json"
        index = read_json(path) if path.is_file() else {}
        if "transformer_2" not in index:
            if (folder / "transformer_2").exists():
                raise ModelError(f"{path} does not name the folder's transformer_2")
            return None
        configs = [read_json(folder / part / "config.json") for part in PARTS]
        for config in configs:
            config.pop("_name_or_path", None)
        if configs[0] != configs[1]:
            raise ModelError(f"{folder}: the configurations of its two transformers differ")
        if "step2_sigma" not in index:
            raise ModelError(f"{path} has transformer_2 but no step2_sigma")
        student = _checked(path, "student", index["step2_sigma"], index.get("transition", "euler"))
        return replace(student, sizes=_sizes(path, index))


def _read_lora_index(path: Path) -> StudentIndex:
    files = [path.with_name(f"{step}.safetensors") for step in STEPS]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{path.parent} lacks {', '.join(missing)}")
    try:
        index = read_json(path)
        values = index["step2_sigma"], index["transition"], str(index["teacher"])
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: expected teacher, step2_sigma and transition, got {error!r}"
        ) from error
    found = replace(_checked(path, "lora_pair", *values), sizes=_sizes(path, index))
    sha256 = index.get("teacher_sha256")
    if sha256 is None:
        return found
    named = values[2]
    if not isinstance(sha256, str) or Path(named).name != named:
        raise ModelError(
            f"{path}: with teacher_sha256, teacher must be the name of a folder, "
            f"got {named[:100]!r}"
        )
    return replace(found, teacher_sha256=sha256)


def _sizes(path: Path, index: dict[str, Any]) -> tuple[Size, ...]:
    try:
        return read_sizes(index.get("sizes", ""))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: sizes: {error}") from error


def read_sizes(text: str) -> tuple[Size, ...]:
    """(height, width) each, from "WIDTHxHEIGHT WIDTHxHEIGHT ..."; a text, since diffusers takes a
    list in its index for a folder.

    Raises:
        ValueError: for another text.
    """
    found = []
    for word in text.split():
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", word)
        if match is None:
            raise ValueError(f"expected WIDTHxHEIGHT, got {word[:50]!r}")
        found.append((int(match[2]), int(match[1])))
    return tuple(found)


def sizes_text(sizes: Iterable[Size]) -> str:
    """What `read_sizes` reads."""
    return " ".join(f"{width}x{height}" for height, width in sizes)


def _checked(
    path: Path, kind: Any, sigma: Any, transition: Any, teacher: Any = None
) -> StudentIndex:
    try:
        if not 0 < float(sigma) < 1:
            raise ValueError(f"step2_sigma must be above 0 and below 1, got {sigma!r}")
        Schedule(1.0, float(sigma), transition)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: {error}") from error
    return StudentIndex(kind, float(sigma), transition, teacher)


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file of a model folder.

    Raises:
        ModelError: if it is missing or no JSON object.
    """
    return read_object(path)
