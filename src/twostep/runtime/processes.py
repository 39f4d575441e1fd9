"""Processes that share work through files on disk, as torchrun starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from twostep.errors import UserError

_WAIT_SECONDS = 24 * 3600


class WaitError(UserError, RuntimeError):
    """Another process did not deliver."""


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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
