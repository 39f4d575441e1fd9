"""Checksums of files: of a folder in it, verified when it is opened.

What others are given has SHA-256, about 1 s for each GB on a core of today, once: what was read is
remembered in the user's cache directory by inode, size and times. What a run keeps for itself has
XXH3-128 (`write_sums`), which costs nothing beside reading the file, and finds damage, not malice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import xxhash

from twostep.errors import ModelError, UserError
from twostep.runtime.files import write_atomically, write_json

NAME, QUICK_NAME = "checksums.json", "sums.json"
# Smaller files are read faster than they are remembered.
_REMEMBERED_BYTES = 8 << 20
_MOST_ENTRIES = 5000
_THREADS, _PART = 4, 4 << 20
_settings = {"verify": True}


def set_verifying(on: bool) -> None:
    """Whether `verify` looks at anything; for the whole process."""
    _settings["verify"] = on


def is_verifying() -> bool:
    """Whether checksums are looked at."""
    return _settings["verify"]


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


def user_cache() -> Path:
    """This package's part of the user's cache directory, which may not be there.

    Raises:
        RuntimeError: if the user has no home.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    named = named if named.is_absolute() else Path("~/.cache")
    return named.expanduser() / "twostep"


def _memory() -> Path:
    return user_cache() / "digests.json"


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
        try:
            found = digest(file) if file.is_file() else None
        except (OSError, ValueError) as error:
            raise ModelError(f"{str(file)[:200]} cannot be read: {error}"[:400]) from error
        if found is None:
            raise ModelError(f"{str(file)[:200]} is missing; {NAME} lists it")
        if found != wanted:
            raise ModelError(
                f"{file} is not as it was written: its checksum is another one. Take the folder "
                f"from where it came, or, if the change is yours, remove {path}"
            )
    return True


class SumsError(UserError):
    """A folder of a run that is not as it was written; the message names the file."""


def write_sums(folder: Path) -> None:
    """Writes `sums.json`, of all the files beside it."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and p.name != QUICK_NAME)
    with ThreadPoolExecutor(_THREADS) as pool:  # neither reading nor hashing holds the interpreter
        sums = dict(zip((p.name for p in paths), pool.map(_quick, paths), strict=True))
    write_json(folder / QUICK_NAME, {"xxh3_128": sums})


def check_sums(folder: Path) -> None:
    """Whether a folder's files are as they were written; true of one without sums.

    Raises:
        SumsError: naming the first that is missing or another one.
    """
    path = folder / QUICK_NAME
    if not path.is_file() or not is_verifying():
        return
    try:
        wanted = dict(json.loads(path.read_text(encoding="utf-8"))["xxh3_128"])
        names = [Path(str(name)).name for name in wanted]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SumsError(f"{path} cannot be read: it lists no checksums") from error
    there = {p.name for p in folder.iterdir() if p.is_file()}
    missing = [name for name in names if name not in there]
    if missing:
        raise SumsError(f"{folder / missing[0][:200]} is missing; {QUICK_NAME} lists it")
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(_quick, [folder / name for name in names]))
    except OSError as error:
        raise SumsError(f"{error.filename} cannot be read: {error.strerror}") from error
    for name, is_now, was in zip(names, found, wanted.values(), strict=True):
        if is_now != was:
            raise SumsError(
                f"{folder / name} is not as it was written: its checksum is another one"
            )


def _quick(path: Path) -> str:
    whole = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while part := file.read(_PART):
            whole.update(part)
    return whole.hexdigest()
