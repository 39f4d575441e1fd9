"""What is refused of a model folder before any library reads it: a stranger may have made it.

Looks at names, links, kinds of files, headers and small JSON files; reads no weights.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostep.errors import ModelError
from twostep.zoo import ZOO

if TYPE_CHECKING:  # a folder is looked at without torch
    from torch import nn

PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "transformer_2", "vae")
# A header of a thousand tensors has 100 kB; a JSON file of a tokenizer 10 MB.
_MOST_HEADER, _MOST_JSON, _MOST_TEXT = 16 << 20, 64 << 20, 1 << 20
_MOST_FILES = 10_000
_WEIGHTS_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")
# Large, and of no shape that is ours to know.
_NOT_PARSED = {"tokenizer.json", "vocab.json"}


def check_folder(folder: Path) -> None:
    """Refuses what no model folder needs, and files that are cut short.

    Links must stay inside the folder, the hub's cache or this package. Every file must be an
    ordinary one, every JSON file of a known part an object without code, every index of weights a
    list of files beside it, every header of weights as long as it says.

    Raises:
        ModelError: naming the file and what is wrong with it.
    """
    allowed = [folder.resolve(), ZOO.resolve(), *_hub_blobs(folder)]
    for path in _entries(folder):
        _check_kind(path, allowed)
        if path.suffix == ".safetensors":
            check_header(path)
        elif path.suffix in (".json", ".jinja", ".txt") and path.is_file():
            _check_text(path, folder)


def check_header(path: Path) -> None:
    """Reads a safetensors file's header, not its tensors.

    Raises:
        ModelError: if it is none, its header is too long, or the file is cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER):
                raise ModelError(
                    f"{path} is no safetensors file, or cut short: a header of {length} bytes in a "
                    f"file of {size}, at most {_MOST_HEADER} are read"
                )
            header = _parsed(file.read(length))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} is no safetensors file: its header cannot be read") from error
    wanted = 8 + length + max(ends, default=0)
    if wanted != size:
        raise ModelError(f"{path} is cut short or damaged: it has {size} bytes, not {wanted}")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What goes wrong while a library reads `path`, as a ModelError that names it.

    Inside, the libraries show no bars of their own for each file that they open.
    """
    try:
        with _without_bars():
            yield
    except ModelError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{path} cannot be loaded: {said}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [
        log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()
    ]
    for log in shown:
        log.disable_progress_bar()
    levels = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    for log, _ in levels:  # what they warn of in weights we refuse ourselves, in a line
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in levels:
            log.set_verbosity(level)
        for log in shown:
            log.enable_progress_bar()


def check_finite(module: nn.Module, path: Path) -> None:
    """Raises ModelError, naming the first, if weights that were read hold NaN or infinity.

    One pass over the weights: as fast as memory is read.
    """
    for name, value in module.state_dict().items():
        if value.is_meta:
            raise ModelError(f"{path}: the weights lack {name}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError(f"{path}: {name} holds values that are not finite")


def _hub_blobs(folder: Path) -> list[Path]:
    """Where the hub's cache keeps the files that a snapshot's links name."""
    found = [p for p in folder.absolute().parents if p.name == "snapshots"]
    return [(p.parent / "blobs").resolve() for p in found]


def _entries(folder: Path) -> Iterator[Path]:
    """Everything in a folder; folders behind links are not entered."""
    count = 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            count += 1
            if count > _MOST_FILES:
                raise ModelError(f"{folder} holds more than {_MOST_FILES} files: no model folder")
            yield Path(place, name)


def _check_kind(path: Path, allowed: Iterable[Path]) -> None:
    if path.is_symlink():
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise ModelError(f"{path} is a link to nothing") from None
        if not any(target.is_relative_to(place) for place in allowed):
            raise ModelError(
                f"{path} is a link out of the model's folder, to {target}; "
                "put the file itself in its place"
            )
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ModelError(f"{path} is a pipe, a device or a socket, expected a file")
    if stat.S_ISDIR(mode) and path.suffix in (".json", ".safetensors", ".jinja"):
        raise ModelError(f"{path} is a folder, expected a file")


def _check_text(path: Path, folder: Path) -> None:
    size, most = path.stat().st_size, _MOST_JSON
    if path.suffix == ".jinja":
        most = _MOST_TEXT
    if size > most:
        raise ModelError(f"{path} has {size} bytes, expected {most} at most")
    is_ours = path.parent.name in PARTS or path.parent == folder
    if path.suffix != ".json" or path.name in _NOT_PARSED or not is_ours:
        return
    values = read_object(path)
    if "auto_map" in values:
        raise ModelError(
            f"{path} names code of its own (auto_map), which is never run; "
            "expected a model of transformers' or diffusers' own classes"
        )
    if path.name.endswith(".index.json"):
        _check_index(path, values)


def _check_index(path: Path, values: dict[str, Any]) -> None:
    names = values.get("weight_map")
    if not isinstance(names, dict):
        raise ModelError(f"{path} has no weight_map")
    beside = {p.name for p in path.parent.glob("*.safetensors")}
    for name in {str(n) for n in names.values()}:
        if not _WEIGHTS_NAME.fullmatch(name):
            raise ModelError(
                f"{path} names {name[:200]!r}, expected .safetensors files beside it alone"
            )
        if beside and name not in beside:
            raise ModelError(f"{path.with_name(name)} is missing; {path.name} names it")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: if the file is missing or no JSON object.
    """
    try:
        values = _parsed(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold an object, found {type(values).__name__}")
    return values


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
