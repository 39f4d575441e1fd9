"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from twostep.errors import UserError

# `.NAME.HOST-PROCESS-NUMBER.tmp`, of this package alone: nothing of a user's is called so.
_TEMPORARY = re.compile(r"\..{1,60}\.([0-9a-f]{8})-(\d{1,10})-(\d+)\.tmp")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_COUNT = itertools.count()
# A process of another host that wrote nothing for so long is taken for dead.
_OLD_SECONDS = 24 * 3600


class WriteError(UserError, OSError):
    """Something that could not be written; the message names the place and why."""

    exit_code = 1


def temporary_beside(path: Path) -> Path:
    """A name beside `path` that nothing has yet; `sweep` knows whose it is."""
    # Of a long name a part: the whole must be a name, too.
    stem = path.name.encode()[:50].decode(errors="ignore")
    return path.with_name(f".{stem}.{_HOST}-{os.getpid()}-{next(_COUNT)}.tmp")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What keeps `path` from being written, as one sentence with the space that is free.

    Raises:
        WriteError: for a full or read-only disk, missing rights, a file in the way.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{path} cannot be written: {_reason(error)}{_free(path)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__


def _free(path: Path) -> str:
    free = free_bytes(path)
    return "" if free is None else f" ({free / 2**30:.2f} GiB are free there)"


def free_bytes(path: Path) -> int | None:
    """Bytes that are free where `path` is or would be; None if nobody can say."""
    for place in (path.absolute(), *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return None
    return None


def make_folder(folder: Path) -> None:
    """Makes a folder with its parents.

    Raises:
        WriteError: if it cannot be.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path beside `path`, syncs it to disk and renames it.

    Raises:
        WriteError: if the disk refuses; nothing is left behind.
    """
    temporary = temporary_beside(path)
    with writing(path):
        try:
            # safetensors' writer lets only the owner read; an ordinary file follows the umask.
            temporary.touch()
            readers = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            temporary.chmod(readers)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    # Windows syncs only what was opened to be written.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder of the same name to fill, which takes `folder`'s place once the block is through.

    What stood there goes at that moment and not before; after an error nothing has changed.

    Raises:
        WriteError: if the disk refuses.
    """
    holder = temporary_beside(folder)
    temporary = holder / folder.name
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def let_read(folder: Path) -> None:
    """Lets others read a folder's files as they may read the folder, whose mode follows the umask.

    safetensors' writer lets only the owner read.
    """
    readers = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readers)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Puts `temporary`, finished, in the place of `folder`, which may exist."""
    let_read(temporary)
    replaced = temporary_beside(folder)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def sweep(folder: Path) -> list[Path]:
    """Removes what killed processes left in `folder` under temporary names; says what.

    Those of a process that lives on this host stay, and those of another host for a day.
    """
    removed = []
    for path in folder.glob(".*.tmp") if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        with suppress(OSError):
            if match[1] == _HOST:
                dead = int(match[2]) != os.getpid() and not is_alive(int(match[2]))
            else:
                dead = time.time() - path.lstat().st_mtime > _OLD_SECONDS
            if dead:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path)
    return removed


def is_alive(process: int) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True
