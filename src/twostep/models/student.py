"""The format of a two-step student, read and written: two transformers, or two LoRA files.

Two transformers: a diffusers folder whose `model_index.json` also has `transformer_2`,
`step2_sigma` and `transition`. Two LoRA files: `first.safetensors`, `second.safetensors` and
`twostep.json`, which names the model they belong to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twostep.errors import ExportError, ModelError
from twostep.method.schedule import Schedule
from twostep.models.foreign import read_object
from twostep.models.lora_files import rank_of, save_lora
from twostep.models.transformer import transformer_with
from twostep.runtime.checksums import write_checksums
from twostep.runtime.files import new_folder, write_json

# What the folder's model_index.json names: the class in its own pipeline.py. Opened as a plain
# ZImagePipeline, diffusers then refuses to load it instead of dropping the second transformer.
CLASS_NAME = ["pipeline", "TwoStepPipeline"]
STANDALONE = Path(__file__).with_name("standalone_pipeline.py")
LORA_INDEX = "twostep.json"
STEPS = ("first", "second")
PARTS = ("transformer", "transformer_2")
# What is copied of a teacher's other parts.
_COPIED = {".json", ".jinja", ".txt", ".safetensors", ".model"}


@dataclass(frozen=True)
class StudentIndex:
    """What a student's folder says of itself.

    Attributes:
        kind: two transformers, or two LoRA files.
        step2_sigma, transition: as in `Schedule`.
        teacher: of LoRA files, the model that they belong to: `zoo:NAME`, a hub id, or the last
            name of a folder.
        teacher_sha256: of such a folder, its fingerprint. Files of earlier versions hold its path.
    """

    kind: Literal["student", "lora_pair"]
    step2_sigma: float
    transition: Any
    teacher: str | None = None
    teacher_sha256: str | None = None

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
        return _checked(path, "student", index["step2_sigma"], index.get("transition", "euler"))


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
    found = _checked(path, "lora_pair", *values)
    sha256 = index.get("teacher_sha256")
    if sha256 is None:
        return found
    if not isinstance(sha256, str) or Path(found.teacher).name != found.teacher:
        raise ModelError(
            f"{path}: with teacher_sha256, teacher must be the name of a folder, "
            f"got {found.teacher[:100]!r}"
        )
    return replace(found, teacher_sha256=sha256)


def _checked(path: Path, kind: Any, sigma: Any, transition: Any, teacher: Any = None) -> Any:
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


def check_free(out: Path) -> None:
    """Raises ExportError if the folder `out` has anything in it."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"out: {out} is a file, expected a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise ExportError(f"out: {out} is not empty")


def save_student(
    teacher: Path,
    first: nn.Module,
    second: nn.Module,
    *,
    schedule: Schedule,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """As `write_student`, of two transformers that are in memory."""
    write_student(teacher, (first, second), schedule=schedule, folder=folder, dtype=dtype)


def write_student(
    teacher: Path,
    transformers: Iterable[nn.Module],
    *,
    schedule: Schedule,
    folder: Path,
    dtype: torch.dtype | None = torch.bfloat16,
    plain_class: bool = False,
) -> None:
    """Writes a student as a diffusers folder: the teacher's parts and two transformers.

    Args:
        teacher: the teacher's folder; everything but its transformer is copied.
        transformers: diffusers transformers of step 1 and step 2; not changed. The second is asked
            for when the first is written and let go.
        folder: replaced if it exists, at the very end.
        dtype: of the weights; None: as they are.
        plain_class: names the pipeline's class by a string, as servers want it; a plain
            `ZImagePipeline` then opens the folder without its second transformer.

    Raises:
        WriteError: if the disk refuses.
    """
    with new_folder(folder) as temporary:
        for part in ("scheduler", "text_encoder", "tokenizer", "vae"):
            _copy_part(teacher / part, temporary / part)
        steps = iter(transformers)
        for name in PARTS:
            transformer = next(steps)
            weights = {k: v.detach().to("cpu", dtype) for k, v in transformer.state_dict().items()}
            _check_written(weights, f"{folder}: {name}")
            transformer_with(transformer, weights).save_pretrained(temporary / name)
            del transformer, weights
        index = read_json(teacher / "model_index.json")
        shutil.copyfile(STANDALONE, temporary / "pipeline.py")
        index["_class_name"] = CLASS_NAME[1] if plain_class else CLASS_NAME
        index["transformer_2"] = index["transformer"]
        index["step2_sigma"] = schedule.step2_sigma
        index["transition"] = schedule.transition
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for path in temporary.glob("*/*config.json"):
            _forget_places(path)
        write_checksums(temporary)


def _check_written(weights: Mapping[str, Tensor], what: str) -> None:
    """Raises ExportError for weights that nobody could use, in the type that they are stored in."""
    for key, value in weights.items():
        if not bool(value.isfinite().all()):
            raise ExportError(f"{what} is not written: {key} holds values that are not finite")


def _copy_part(part: Path, target: Path) -> None:
    """What a loader of ours reads of a part; of links their content."""
    target.mkdir()
    for path in sorted(part.rglob("*")):
        if path.is_file() and path.suffix in _COPIED:
            copy = target / path.relative_to(part)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _forget_places(path: Path) -> None:
    """Drops the folder of this machine that a configuration was read from."""
    config = read_json(path)
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_lora_pair(
    folder: Path,
    pair: Sequence[Mapping[str, Tensor]],
    *,
    teacher: tuple[str, str | None],
    schedule: Schedule,
) -> None:
    """Writes a student of two LoRA files.

    Args:
        folder: replaced if it exists, at the very end.
        pair: each step's matrices, as `save_lora` takes them.
        teacher: its name and fingerprint, as in `StudentIndex`.
    """
    with new_folder(folder) as temporary:
        for step, weights in zip(STEPS, pair, strict=True):
            _check_written(weights, f"{folder}: {step}")
            save_lora(weights, rank_of(weights), temporary, f"{step}.safetensors")
        write_lora_index(temporary, teacher=teacher, schedule=schedule)
        write_checksums(temporary)


def write_lora_index(folder: Path, *, teacher: tuple[str, str | None], schedule: Schedule) -> None:
    """Makes a folder of two LoRA files a student of `teacher`, its name and fingerprint."""
    name, sha256 = teacher
    index = {
        "teacher": name,
        **({} if sha256 is None else {"teacher_sha256": sha256}),
        "step2_sigma": schedule.step2_sigma,
        "transition": schedule.transition,
    }
    write_json(folder / LORA_INDEX, index)
