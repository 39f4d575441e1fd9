"""Signals that ask a process to end, collected until it is ready to."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def ending_signals() -> list[signal.Signals]:
    """Ctrl-C, a scheduler's end, a closed terminal; the last not under nohup, which ignores it."""
    found = [signal.SIGTERM, signal.SIGINT]
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        found.append(hang_up)
    return found


@contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Collects SIGTERM, SIGINT and SIGHUP instead of dying of them; a second one kills."""
    caught: list[str] = []
    previous = {}

    def remember(number: int, _: Any) -> None:
        if caught:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(signal.Signals(number).name)

    try:
        for number in ending_signals():
            previous[number] = signal.signal(number, remember)
    except ValueError:  # not the main thread: the caller handles signals
        previous.clear()
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def catch_hangup() -> Iterator[list[str]]:
    """Collects SIGHUP: the usual way to ask a server to read its files anew."""
    caught: list[str] = []
    if not hasattr(signal, "SIGHUP"):  # Windows
        yield caught
        return
    previous = signal.signal(signal.SIGHUP, lambda number, _: caught.append("SIGHUP"))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGHUP, previous)
