"""Limits on what other people's files make this process do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What `call` returns, or raises, if it does so in time.

    Python cannot end a thread: one that is late goes on, and ends with the process.

    Raises:
        TimeoutError: after `seconds`.
    """
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((call(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"not done in {seconds:g} seconds")
    result, error = found[0]
    if error is not None:
        raise error
    return result
