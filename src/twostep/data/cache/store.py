"""Where a cache's files are: a local folder, or an object store with copies in a local folder.

Everything that reads or writes a cache names files in `Store.folder`. A store elsewhere is told of
each file that was written there, and asked for each before it is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from twostep.errors import RecipeError, UserError
from twostep.runtime.files import write_atomically

_SHARDS = "shard-*.safetensors"
_DOWNLOADS = 4


class CacheError(UserError, RuntimeError):
    """A cache that cannot be used; the message names the file and what to do."""


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_url(location: Path | str) -> bool:
    """Whether a cache is elsewhere than in a folder: s3://, gs://, hf://, memory://, file://."""
    return "://" in str(location)


class Store:
    """A local folder.

    Attributes:
        folder: of the files, or of their copies.
        room: bytes of shards that the folder holds at most; None: all of them.
    """

    folder: Path
    room: int | None = None
    is_remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shown(self, path: Path) -> str:
        """A file's name for messages."""
        return str(path)

    def refresh(self, path: Path) -> bool:
        """Whether a small file is there; it is now as the store has it."""
        return path.is_file()

    def size(self, path: Path) -> int | None:
        """Bytes; None if it is not there."""
        return path.stat().st_size if path.exists() else None

    def put(self, path: Path) -> None:
        """Tells of a file that was written whole."""

    def fetch(self, path: Path, sha256: str | None = None) -> Path:
        """A file to be read now.

        Raises:
            CacheError: if it cannot be had, or is not the one that `sha256` says.
        """
        return path

    def ahead(self, wanted: Mapping[Path, str]) -> None:
        """Files, with their sha256, that will be fetched soon."""


class ObjectStore(Store):
    """Files under a URL that fsspec knows; an object is there whole or not at all.

    Several processes may share the folder of copies. The copies read longest ago make room.
    """

    is_remote = True

    def __init__(self, url: str, folder: Path, room: int) -> None:
        super().__init__(folder)
        self.url, self.room = url.rstrip("/"), room
        self._fs, self._root = open_location(self.url)
        self._good: set[str] = set()  # copies that this process has looked at
        self._threads = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="shards")
        self._coming: dict[Path, Future[Path]] = {}

    def shown(self, path: Path) -> str:
        return f"{self.url}/{path.name}"

    def refresh(self, path: Path) -> bool:
        with self._named(path):
            try:
                self._fs.invalidate_cache()
                content = self._fs.cat_file(self._key(path))
            except FileNotFoundError:
                path.unlink(missing_ok=True)
                return False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda p: p.write_bytes(content))
        return True

    def size(self, path: Path) -> int | None:
        with self._named(path):
            try:
                self._fs.invalidate_cache()
                return int(self._fs.info(self._key(path))["size"])
            except FileNotFoundError:
                return None

    def put(self, path: Path) -> None:
        with self._named(path):
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.put_file(str(path), self._key(path))
        self._make_room(path)

    def fetch(self, path: Path, sha256: str | None = None) -> Path:
        coming = self._coming.pop(path, None)
        if coming is not None and not coming.cancel():
            wait([coming])  # what went wrong is told below
        return self._bring(path, sha256)

    def _bring(self, path: Path, sha256: str | None) -> Path:
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not self._is_good(path, sha256):
                with self._named(path):
                    write_atomically(path, lambda p: self._fs.get_file(self._key(path), str(p)))
                if not self._is_good(path, sha256):
                    path.unlink()
                    raise CacheError(
                        f"{self.shown(path)} is corrupt: its checksum is not the one in its "
                        "record. Rebuild it: `twostep teach RECIPE --repair`"
                    )
            os.utime(path)  # just used
        self._make_room(path)
        return path

    def ahead(self, wanted: Mapping[Path, str]) -> None:
        for path, sha256 in wanted.items():
            coming = self._coming.get(path)
            if (coming is None or coming.done()) and not path.exists():
                self._coming[path] = self._threads.submit(self._bring, path, sha256)

    def _is_good(self, path: Path, sha256: str | None) -> bool:
        """Whether a copy is there and, where it is looked at first, the right one."""
        if not path.exists():
            self._good.discard(path.name)
            return False
        if path.name not in self._good and (sha256 is None or checksum(path) == sha256):
            self._good.add(path.name)
        return path.name in self._good

    def _make_room(self, kept: Path) -> None:
        """Removes the copies read longest ago, `kept` never, until the rest has room."""
        found = []
        for path in self.folder.glob(_SHARDS):
            with suppress(FileNotFoundError):  # another process made room
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if self.room is None or used <= self.room:
                return
            if path != kept:
                path.unlink(missing_ok=True)
                used -= size

    def _key(self, path: Path) -> str:
        return f"{self._root}/{path.name}"

    @contextmanager
    def _named(self, path: Path) -> Any:
        """What goes wrong in the store's own code, as a sentence."""
        try:
            yield
        except FileNotFoundError as error:
            raise CacheError(f"{self.shown(path)} is gone") from error
        except UserError:
            raise
        except Exception as error:
            raise CacheError(f"data.cache: {self.shown(path)}: {error}") from error


def open_location(url: Path | str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it; asks nothing of it.

    Raises:
        RecipeError: naming `data.cache`, for a URL that nothing here can open.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(str(url))
    except ImportError as error:
        raise RecipeError(f"data.cache: {url} needs another package: {error}") from error
    except Exception as error:
        raise RecipeError(f"data.cache: {url} cannot be opened: {error}") from error


def open_store(
    location: Path | str, *, copies: Path, room_gib: float, fingerprint: Callable[[], str]
) -> Store:
    """The store of a cache.

    Args:
        location: a folder or a URL.
        copies: the folder of copies for a URL; each cache has one of its own in it.
        room_gib: GiB of shards in it.
        fingerprint: of the cache.

    Raises:
        RecipeError: naming `data.cache`, for a URL that nothing here can open.
    """
    if not is_url(location):
        return Store(Path(location))
    name = hashlib.sha256(f"{location} {fingerprint()}".encode()).hexdigest()[:16]
    return ObjectStore(str(location), copies / name, int(room_gib * 2**30))
