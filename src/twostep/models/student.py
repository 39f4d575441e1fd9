"""A two-step student, written: two transformers, or two LoRA files (`student_index.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from twostep.errors import ExportError
from twostep.method.schedule import Schedule
from twostep.models.lora_files import rank_of, save_lora
from twostep.models.student_index import LORA_INDEX, PARTS, STEPS, Size, read_json, sizes_text
from twostep.models.transformer import transformer_with
from twostep.runtime.checksums import write_checksums
from twostep.runtime.files import new_folder, write_json

# What the folder's model_index.json names: the class in its own pipeline.py. Opened as a plain
# ZImagePipeline, diffusers then refuses to load it instead of dropping the second transformer.
CLASS_NAME = ["pipeline", "TwoStepPipeline"]
STANDALONE = Path(__file__).with_name("standalone_pipeline.py")
# What is copied of a teacher's other parts.
_COPIED = {".json", ".jinja", ".txt", ".safetensors", ".model"}


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
    sizes: Sequence[Size] = (),
) -> None:
    """As `write_student`, of two transformers that are in memory."""
    write_student(
        teacher, (first, second), schedule=schedule, folder=folder, dtype=dtype, sizes=sizes
    )


def write_student(
    teacher: Path,
    transformers: Iterable[nn.Module],
    *,
    schedule: Schedule,
    folder: Path,
    dtype: torch.dtype | None = torch.bfloat16,
    plain_class: bool = False,
    sizes: Sequence[Size] = (),
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
        sizes: as in `StudentIndex`.

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
        if sizes:
            index["sizes"] = sizes_text(sizes)
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
    sizes: Sequence[Size] = (),
) -> None:
    """Writes a student of two LoRA files.

    Args:
        folder: replaced if it exists, at the very end.
        pair: each step's matrices, as `save_lora` takes them.
        teacher: its name and fingerprint, as in `StudentIndex`.
        sizes: as in `StudentIndex`.
    """
    with new_folder(folder) as temporary:
        for step, weights in zip(STEPS, pair, strict=True):
            _check_written(weights, f"{folder}: {step}")
            save_lora(weights, rank_of(weights), temporary, f"{step}.safetensors")
        write_lora_index(temporary, teacher=teacher, schedule=schedule, sizes=sizes)
        write_checksums(temporary)


def write_lora_index(
    folder: Path,
    *,
    teacher: tuple[str, str | None],
    schedule: Schedule,
    sizes: Sequence[Size] = (),
) -> None:
    """Makes a folder of two LoRA files a student of `teacher`, its name and fingerprint."""
    name, sha256 = teacher
    index = {
        "teacher": name,
        **({} if sha256 is None else {"teacher_sha256": sha256}),
        "step2_sigma": schedule.step2_sigma,
        "transition": schedule.transition,
    }
    if sizes:
        index["sizes"] = sizes_text(sizes)
    write_json(folder / LORA_INDEX, index)
