"""`twostep check`: whether a model, a cache or a run folder is sound, read from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from twostep.data.cache.shards import checksum
from twostep.distill.monitor import read_metrics
from twostep.distill.run_folder import RunFolder
from twostep.distill.tensor_files import check_whole
from twostep.errors import InputError, UserError
from twostep.models.folder import ModelFolder
from twostep.models.foreign import check_header
from twostep.recipe.schema import Recipe
from twostep.runtime.checksums import SumsError, verify


class UnsoundError(UserError):
    """A folder with faults; the message names the files, a line each."""

    exit_code = 1


def check(folder: Path) -> list[str]:
    """Reads a folder and says what it holds, a line each.

    Raises:
        InputError: if it is neither a model nor a cache nor a run.
        UnsoundError: naming every file that is not as it should be.
    """
    kinds: tuple[tuple[str, Callable[[Path], list[str]]], ...] = (
        ("model_index.json", _model),
        ("twostep.json", _model),
        ("manifest.json", _cache),
        ("run.json", _run),
    )
    for name, look in kinds:
        if (folder / name).is_file():
            return look(folder)
    raise InputError(
        f"folder: {folder} holds no model (model_index.json, twostep.json), no finished cache "
        "(manifest.json) and no run (run.json)"
    )


def _model(folder: Path) -> list[str]:
    try:
        model = ModelFolder.open(folder)
    except UserError as error:
        raise UnsoundError(str(error)) from error
    places = dict.fromkeys((model.path, model.base))
    files = [path for place in places for path in sorted(place.rglob("*.safetensors"))]
    _raise(fault for fault in map(_tensors, files) if fault)
    known = "checksums hold" if verify(folder) else "it has no checksums"
    return [f"{folder}: a sound {model.kind}, {len(files)} files of weights, {known}"]


def _cache(folder: Path) -> list[str]:
    faults = []
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        shards = [(str(s["file"]), str(s["sha256"])) for s in manifest["shards"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnsoundError(f"{folder / 'manifest.json'} is not a manifest") from error
    for name, sha256 in shards:
        path = folder / Path(name).name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif checksum(path) != sha256:
            faults.append(f"{path} is not as it was written: its checksum is another one")
        elif (fault := _tensors(path)) is not None:
            faults.append(fault)
        if not path.with_suffix(".json").is_file():
            faults.append(f"{path.with_suffix('.json')} is missing")
    if (fault := _tensors(folder / "empty.safetensors")) is not None:
        faults.append(fault)
    _raise(faults)
    return [f"{folder}: a sound cache, {manifest.get('samples')} samples in {len(shards)} files"]


def _run(folder: Path) -> list[str]:
    run, lines, faults = RunFolder(folder), [], []
    try:
        Recipe.load(run.recipe)
    except UserError as error:
        faults.append(str(error))
    if not run.is_ours():
        faults.append(f"{folder / 'run.json'} does not say what the run computes with")
    parts = [run.best, *(sorted(run.frozen.iterdir()) if run.frozen.is_dir() else ())]
    parts += sorted(run.checkpoints.glob("[ft]*-*")) if run.checkpoints.is_dir() else []
    for part in parts:
        try:
            check_whole(part)
        except SumsError as error:
            faults.append(str(error))
            continue
        for path in sorted(part.glob("*.safetensors")):
            if (fault := _tensors(path)) is not None:
                faults.append(fault)
        if part.parent == run.checkpoints and not _is_object(part / "state.json"):
            faults.append(f"{part / 'state.json'} cannot be read")
    lines.append(f"{folder}: a sound run, {len(parts)} folders of weights")
    written = folder / "metrics.jsonl"
    if written.is_file():
        torn = written.read_bytes().count(b"\n") - len(read_metrics(folder))
        lines.append(f"{written}: {len(read_metrics(folder))} records, {max(0, torn)} torn lines")
    if run.student.is_dir():
        try:
            lines += _model(run.student)
        except UserError as error:
            faults.append(str(error))
    _raise(faults)
    return lines


def _is_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _tensors(path: Path) -> str | None:
    """What is wrong with a file of tensors: header, length, or a value that is not finite."""
    try:
        check_header(path)
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                value = file.get_tensor(key)
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    return f"{path}: {key} holds values that are not finite"
    except UserError as error:
        return str(error)
    except (SafetensorError, OSError, ValueError) as error:
        return f"{path} cannot be read: {error}"
    return None


def _raise(faults: Iterable[str]) -> None:
    found = list(faults)
    if found:
        raise UnsoundError("\n".join(found))
