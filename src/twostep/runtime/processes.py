"""Processes that share work through files on disk, as torchrun starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from twostep.errors import UserError
from twostep.runtime.notices import notice

# Without a sign of life of the others; one picture or one model's weights may take minutes.
_SILENT_SECONDS = 20 * 60.0
_SAY_SECONDS, _LOOK_SECONDS = 30.0, 1.0

_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"))

Item = TypeVar("Item")


class WaitError(UserError, RuntimeError):
    """Another process did not deliver."""


@dataclass(frozen=True)
class Share:
    """One process's part of the work: the `rank`-th of `size`."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> Share:
        """As torchrun started this process; the whole without torchrun.

        Raises:
            WaitError: if RANK and WORLD_SIZE are no such numbers.
        """
        found = [os.environ.get(name) or default for name, default in _VARIABLES]
        if not all(text.isdecimal() for text in found) or int(found[0]) >= int(found[1]):
            raise WaitError(
                "RANK and WORLD_SIZE in the environment must be numbers, the first below the "
                f"second, got {found[0][:20]!r} and {found[1][:20]!r}"
            )
        return Share(*map(int, found))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Its part of `items`: every `size`-th of them."""
        return items[self.rank :: self.size]


ALONE = Share()


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU where `device` is CUDA without a number."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def wait_for(
    ready: Callable[[], bool],
    share: Share,
    *,
    what: Callable[[], str],
    folder: Path | None = None,
) -> None:
    """Returns once `ready()`; one process alone has nobody to wait for.

    Args:
        what: is still missing, in words.
        folder: where the others show signs of life (`beat`).

    Raises:
        WaitError: at once if this process is alone; else after minutes in which neither `what` nor
            a sign of life changed.
    """
    started = changed = time.monotonic()
    seen: object = None
    said = False
    while not ready():
        missing = what()
        if share.size == 1:
            raise WaitError(f"{missing}: another process changed or removed it meanwhile")
        now = time.monotonic()
        signs = (missing, *_beats(folder))
        if signs != seen:
            seen, changed = signs, now
        whom = f"{missing}, for which process {share.rank} waits, one of {share.size}"
        if now - changed > _SILENT_SECONDS:
            raise WaitError(
                f"gave up on {whom}: no sign of the others for {now - changed:.0f} seconds "
                "(RANK and WORLD_SIZE in the environment say how many there are)"
            )
        if not said and now - started >= _SAY_SECONDS:
            said = True
            notice(f"{whom} (as RANK and WORLD_SIZE in the environment say)")
        time.sleep(_LOOK_SECONDS)


def beat(folder: Path, share: Share) -> None:
    """Shows the other processes that this one is at work."""
    if share.size > 1:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".alive-{share.rank}").touch()


def end_beats(folder: Path) -> None:
    """Removes what `beat` left, once all are done."""
    for path in folder.glob(".alive-*"):
        path.unlink(missing_ok=True)


def _beats(folder: Path | None) -> list[tuple[str, int]]:
    found = []
    for path in sorted(folder.glob(".alive-*")) if folder is not None else ():
        with suppress(OSError):
            found.append((path.name, path.stat().st_mtime_ns))
    return found
