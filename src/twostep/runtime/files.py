"""Files that are either whole or not there, and what tells folders of weights apart."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path beside `path`, syncs it to disk and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Puts `temporary`, finished, in the place of `folder`, which may exist."""
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def folder_fingerprint(folder: Path) -> str:
    """Changes with a model folder's weights, configurations or templates."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".jinja"):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(_sketch(path))
    return digest.hexdigest()


def _sketch(path: Path) -> bytes:
    """Size, first and last MiB: tells weights apart without reading 12 GB of them."""
    size, edge = path.stat().st_size, 1 << 20
    with path.open("rb") as file:
        head = file.read(edge)
        file.seek(max(0, size - edge))
        return size.to_bytes(8, "big") + hashlib.sha256(head + file.read(edge)).digest()
