"""How far the work is: a bar in a terminal, full lines elsewhere; never silent for long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Seconds between lines where stderr is no terminal: soon at first, seldom in a long run.
_FIRST_LINE, _LINE = 4.0, 30.0


def clock(seconds: float) -> str:
    """`0:07`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Lines:
    """One full line for each state, on stderr; repeated with the time spent while nothing changes.

    Not cut or wrapped, whatever the width: programs and logs read them.
    """

    def __init__(self, first: str, *, patience: float = _FIRST_LINE) -> None:
        self._said, self._patience = first, patience
        self._started = time.monotonic()
        self._changed, self._over = threading.Event(), threading.Event()
        write_line(first)
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """A line now."""
        self._said = text
        self._changed.set()
        write_line(text)

    def note(self, text: str) -> None:
        """What to say when the next line is due."""
        self._said = text

    def close(self) -> None:
        self._over.set()
        self._changed.set()
        self._thread.join(1)

    def _repeat(self) -> None:
        wait = self._patience
        while not self._over.is_set():
            if self._changed.wait(wait):
                self._changed.clear()
                wait = _LINE
            else:
                write_line(f"{self._said} ({clock(time.monotonic() - self._started)})")
                wait = min(2 * wait, _LINE)


def write_line(text: str) -> None:
    """A line on stderr, where Python shows as escapes what the encoding lacks."""
    print(text, file=sys.stderr, flush=True)


class Advance:
    """Moves a bar on when called with how many are done."""

    def __init__(self, title: str, total: int, *, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.started = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count

    def line(self) -> str:
        """The state in words."""
        share = f" ({100 * self.done / self.total:.0f}%)" if self.total else ""
        text = f"{self.title}: {self.done} of {self.total}{share}"
        spent = time.monotonic() - self.started
        if self.unit and self.done:
            text += f", {self.done / max(spent, 1e-6):.1f} {self.unit}/s"
        if 0 < self.done < self.total:
            text += f", {clock(spent * (self.total - self.done) / self.done)} left"
        return text


@contextmanager
def progress_bar(
    title: str, total: int, *, unit: str = "", hidden: bool = False
) -> Iterator[Advance]:
    """A bar on stderr, lines where that is no terminal; what it yields advances it.

    Args:
        unit: of the rate beside it. With one the last state stays when it is done.
        hidden: show nothing, as the processes after the first do.
    """
    if hidden:
        yield Advance(title, total, unit=unit)
    elif is_terminal():
        with _bar(title, total, unit=unit) as advance:
            yield advance
    else:
        with _lines(title, total, unit=unit) as advance:
            yield advance


def is_terminal() -> bool:
    """Whether somebody looks at stderr."""
    return bool(sys.stderr.isatty())


@contextmanager
def _lines(title: str, total: int, *, unit: str) -> Iterator[Advance]:
    lines = Lines(f"{title}: 0 of {total}")

    class Said(Advance):
        last = time.monotonic()

        def __call__(self, count: int) -> None:
            super().__call__(count)
            lines.note(self.line())
            now = time.monotonic()
            if now - self.last >= _LINE or (self.done >= self.total and count and self.unit):
                self.last = now
                lines.say(self.line())

    try:
        yield Said(title, total, unit=unit)
    finally:
        lines.close()


@contextmanager
def _bar(title: str, total: int, *, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: list[Any] = [
        TextColumn(title), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(compact=True), TextColumn("left {task.fields[rate]}"),
    ]  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=not unit) as bars:
        bar = bars.add_task("", total=total, rate="")

        class Shown(Advance):
            def __call__(self, count: int) -> None:
                super().__call__(count)
                spent = max(time.monotonic() - self.started, 1e-6)
                rate = f"{self.done / spent:.1f} {unit}/s" if unit else ""
                bars.update(bar, advance=count, rate=rate)

        yield Shown(title, total, unit=unit)


@contextmanager
def working(what: str, *, hidden: bool = False) -> Iterator[None]:
    """Says at once what goes on, and that it still does; for work that cannot be counted."""
    if hidden:
        yield
    elif is_terminal():
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn("line"), TextColumn(what, markup=False), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            bars.add_task("", total=None)
            yield
    else:
        lines = Lines(what)
        try:
            yield
        finally:
            lines.close()
