"""One progress bar for whatever has a number of things to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(
    title: str, total: int, *, unit: str = "", hidden: bool = False
) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; what it yields advances it.

    Args:
        unit: of the rate beside it. With one the bar stays when it is done, and its last state is
            printed where stderr is no terminal; without it leaves nothing behind.
        hidden: show nothing, as the processes after the first do.
    """
    console = Console(stderr=True)
    hidden = hidden or not (unit or console.is_terminal)
    columns = (
        TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )  # fmt: skip
    started, done = time.monotonic(), 0
    with Progress(*columns, console=console, transient=not unit, disable=hidden) as bars:
        bar = bars.add_task("", total=total, rate="")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            rate = f"{done / (time.monotonic() - started):.1f} {unit}/s" if unit else ""
            bars.update(bar, advance=count, rate=rate)

        yield advance
