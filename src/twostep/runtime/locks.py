"""A folder that one process works in, and who that is.

The lock is the operating system's (flock, on NFS too): it goes with its process, so that none is
ever stale. Where a file system has no such locks, work goes on without.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from twostep.errors import UserError
from twostep.runtime.files import make_folder
from twostep.runtime.notices import notice

_NAME, _HOLDER = ".lock", ".lock-holder.json"


@dataclass(frozen=True)
class Holder:
    """Who works in a folder; as far as it is known.

    Attributes:
        purpose: tells what may wait for it (the same work) from what may not.
    """

    host: str = "another host"
    process: int = 0
    since: str = "some time ago"
    purpose: str = ""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    @staticmethod
    def of(folder: Path) -> Holder:
        """The last that took the folder."""
        try:
            said = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
            return Holder(
                str(said["host"])[:100], int(said["process"]), str(said["since"])[:40],
                str(said["purpose"])[:200],
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return Holder()


class InUseError(UserError):
    """A folder in which another process works."""

    def __init__(self, folder: Path, option: str, holder: Holder) -> None:
        super().__init__(
            f"{option}: {folder} is in use by {holder}; wait for its end, or name another"
        )
        self.holder = holder


def is_held(folder: Path) -> bool:
    """Whether a process says that it works in `folder`; one that was killed says so, too."""
    return (folder / _HOLDER).is_file()


@contextmanager
def locked(folder: Path, *, option: str, purpose: str = "", wait: bool = False) -> Iterator[None]:
    """Inside, no other process works in `folder`.

    Args:
        option: what named the folder, as the user typed it.
        wait: for a process of the same purpose.

    Raises:
        InUseError: if another one works there.
        WriteError: if the folder cannot be written.
    """
    make_folder(folder)
    lock = FileLock(str(folder / _NAME), thread_local=False)
    said = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            holder = Holder.of(folder)
            if not wait or holder.purpose != purpose:
                raise InUseError(folder, option, holder) from None
            if not said:
                said = True
                notice(f"{folder} is in use by {holder}; this process waits for it")
            time.sleep(1)
        except (OSError, NotImplementedError) as error:
            notice(f"{folder}: the file system has no locks ({error}); going on without")
            break
    try:
        with suppress(OSError):
            said_now = {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "purpose": purpose,
            }
            (folder / _HOLDER).write_text(json.dumps(said_now), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            if lock.is_locked:
                (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()
