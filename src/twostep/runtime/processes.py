"""Processes that share work through files on disk, as torchrun starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from twostep.errors import UserError

_WAIT_SECONDS = 24 * 3600

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
        """As torchrun started this process; the whole without torchrun."""
        return Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

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


def wait_for(ready: Callable[[], bool], whom: str) -> None:
    """Returns once `ready()`.

    Raises:
        WaitError: after a day.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise WaitError(f"gave up waiting for {whom}")
        time.sleep(1)
