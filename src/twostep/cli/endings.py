"""How a command ends that somebody, or the machine, stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twostep.runtime.notices import notice
from twostep.runtime.signals import ending_signals


class _Ended(BaseException):
    """Raised by a signal where nothing else waits for it, so that temporary files go."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end what runs inside with one line, and 130, 143 or 129.

    Training catches both itself and saves first.
    """

    def end(number: int, _: Any) -> None:
        for each in previous:  # a second one ends it without putting anything away
            signal.signal(each, signal.SIG_DFL)
        raise _Ended(signal.Signals(number))

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in ending_signals():
            previous[number] = signal.signal(number, end)
    try:
        yield
    except _Ended as ended:
        number = ended.args[0]
        notice(f"ended by {number.name}; run it again to go on")
        raise SystemExit(128 + number) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def reason(error: BaseException) -> str:
    """An error of the operating system in words, with the path that it names."""
    if isinstance(error, MemoryError):
        return "out of memory"
    path = getattr(error, "filename", None)
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{path}: {said}" if path else said
