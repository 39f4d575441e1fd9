"""Checksums of files: of a folder beside it, verified when it is opened.

SHA-256, about 1 s for each GB on a core of today, once: what was read is remembered in the user's
cache directory by inode, size and times.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from twostep.errors import ModelError
from twostep.runtime.files import write_atomically, write_json

NAME = "checksums.json"
# Smaller files are read faster than they are remembered.
_REMEMBERED_BYTES = 8 << 20
_MOST_ENTRIES = 5000
_settings = {"verify": True}


def set_verifying(on: bool) -> None:
    """Whether `verify` looks at anything; for the whole process."""
    _settings["verify"] = on


def digest(path: Path) -> str:
    """SHA-256 of a file's whole content, in hex."""
    state = path.stat()
    if state.st_size < _REMEMBERED_BYTES:
        return _read(path)
    key = (
        f"{path.resolve()} {state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns} "
        f"{state.st_ctime_ns}"
    )
    known = _known()
    if key not in known:
        known[key] = _read(path)
        _remember(known)
    return known[key]


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _memory() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    named = named if named.is_absolute() else Path("~/.cache")
    return named.expanduser() / "twostep" / "digests.json"


@cache
def _known() -> dict[str, str]:
    with suppress(OSError, ValueError, RuntimeError):
        found = json.loads(_memory().read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in found.items()}
    return {}


def _remember(known: dict[str, str]) -> None:
    with suppress(OSError, RuntimeError):  # no home, or a full one: read again next time
        path = _memory()
        path.parent.mkdir(parents=True, exist_ok=True)
        newest = dict(list(known.items())[-_MOST_ENTRIES:])
        write_atomically(path, lambda p: p.write_text(json.dumps(newest), encoding="utf-8"))


def walk(folder: Path) -> Iterator[Path]:
    """Every file of a folder, behind links to folders too, each folder once; in order."""
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        state = os.stat(place)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders.sort()
        for name in sorted(files):
            yield Path(place, name)


def folder_fingerprint(folder: Path) -> str:
    """Changes with a model folder's weights, configurations or templates, wherever in them."""
    whole = hashlib.sha256()
    for path in walk(folder):
        if path.suffix in (".json", ".safetensors", ".jinja") and path.name != NAME:
            whole.update(f"{path.relative_to(folder).as_posix()} {digest(path)}\n".encode())
    return whole.hexdigest()


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json`, of all the files in a folder."""
    files = {
        path.relative_to(folder).as_posix(): digest(path)
        for path in walk(folder)
        if path.name != NAME
    }
    write_json(folder / NAME, {"sha256": files})


def verify(folder: Path) -> bool:
    """Whether a folder has checksums; they hold if it has.

    Raises:
        ModelError: naming the first file that is missing or another one.
    """
    path = folder / NAME
    if not path.is_file() or not _settings["verify"]:
        return False
    try:
        files = dict(json.loads(path.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: it lists no checksums") from error
    for name, wanted in files.items():
        parts = Path(str(name)).parts
        if not parts or ".." in parts or Path(str(name)).is_absolute():
            raise ModelError(f"{path} names {str(name)[:100]!r}, which is outside the folder")
        file = folder / str(name)
        if not file.is_file():
            raise ModelError(f"{file} is missing; {NAME} lists it")
        if digest(file) != wanted:
            raise ModelError(
                f"{file} is not as it was written: its checksum is another one. Take the folder "
                f"from where it came, or, if the change is yours, remove {path}"
            )
    return True
