"""How far a training run is: two lines in a terminal, one full line a record elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from twostep.distill.objectives.terms import TERMS
from twostep.runtime.progress import Lines, clock, is_terminal, write_line

_SHOWN = {
    "loss": "loss",
    **{f"final/{term.name}": term.short for term in TERMS if term.short},
    "critic/accuracy_final": "critic",
    "score/flow_matching": "score",
    "validation/kernel_distance": "distance",
    "validation/diversity": "diversity",
}


class TurnProgress:
    """Turns, share, time left and losses, on stderr.

    Everything that takes time moves it on: turns of the score's fit, of fakes and critic before
    the student's first with them, the student's own, and validations.

    Args:
        turns: of the student.
        minutes: after which the run ends, whatever its turns.
        others: the turns before, and validations.
    """

    def __init__(
        self, turns: int, minutes: float | None, *, others: int = 0, hidden: bool = False
    ) -> None:
        self.turns, self.minutes, self.total = turns, minutes, max(1, turns + others)
        self.hidden, self.done, self.turn = hidden, 0, 0
        self._begun_at = 0
        self._seconds = self._begun_seconds = 0.0
        self._phase = "preparing"
        self._latest: dict[str, float] = {}
        self._lines: Lines | None = None
        self._live: Any = None
        self._console: Any = None

    def __enter__(self) -> TurnProgress:
        if self.hidden:
            return self
        if is_terminal():
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text

            self._console = Console(stderr=True)
            self._live = Live(
                console=self._console,
                get_renderable=lambda: Text(self._drawn()),
                refresh_per_second=4,
            )
            self._live.start()
        else:
            self._lines = Lines(f"distil: {self._phase}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._lines is not None:
            self._lines.close()

    def print(self, text: str) -> None:
        """A line above the bar."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self.hidden:
            write_line(text)

    def begin(self, done: int, seconds: float) -> None:
        """Where a run goes on: what was done in earlier ones, in how many seconds."""
        self.done = self._begun_at = done
        self._seconds = self._begun_seconds = seconds

    def phase(self, name: str) -> None:
        """What goes on now, such as `validation`."""
        self._phase = name
        if self._lines is not None:
            self._lines.note(self._line())

    def advance(self, seconds: float, *, turn: int, phase: str = "turns") -> None:
        """One thing more is done, `seconds` into the run; `turn` turns of the student are."""
        self.done, self.turn, self._seconds = min(self.done + 1, self.total), turn, seconds
        self.phase(phase)

    def show(self, values: dict[str, float]) -> None:
        """A record: its losses, and without a terminal its line."""
        self._latest |= {k: v for k, v in values.items() if k in _SHOWN}
        if self._lines is not None:
            self._lines.say(self._line())

    @property
    def share(self) -> float:
        """Of the run, 0 to 1: by what is done or by time, whichever is further."""
        share = self.done / self.total
        if self.minutes is not None:
            share = max(share, self._seconds / (60 * self.minutes))
        return min(1.0, share)

    @property
    def left(self) -> float | None:
        """Seconds; None before anything was done."""
        found = []
        if self.done > self._begun_at:
            spent = self._seconds - self._begun_seconds
            found.append((self.total - self.done) * spent / (self.done - self._begun_at))
        if self.minutes is not None:
            found.append(max(0.0, 60 * self.minutes - self._seconds))
        return min(found, default=None)

    def _state(self) -> list[str]:
        left = "" if self.left is None else f"{clock(self.left)} left"
        parts = [f"turn {self.turn} of {self.turns}", f"{100 * self.share:.0f}%", left]
        return [part for part in parts if part]

    def _losses(self) -> list[str]:
        return [f"{_SHOWN[key]} {value:.3g}" for key, value in self._latest.items()]

    def _line(self) -> str:
        phase = [] if self._phase == "turns" else [self._phase]
        return "distil: " + ", ".join(
            [*self._state(), *phase, f"{clock(self._seconds)} spent", *self._losses()]
        )

    def _drawn(self) -> str:
        """Two lines that fit; what has no room is left out from the end."""
        width = self._console.width - 1
        state = [*self._state(), clock(self._seconds)]
        room = max(0, min(30, width - 2 * len(state) - sum(map(len, state)) - 2))
        filled = round(room * self.share)
        solid, empty = _BLOCKS if _shows(self._console.encoding) else _PLAIN_BLOCKS
        first = _fitted([solid * filled + empty * (room - filled), *state], width)
        phase = [] if self._phase == "turns" else [self._phase]
        return f"{first}\n{_fitted([*phase, *self._losses()], width)}"


_BLOCKS, _PLAIN_BLOCKS = ("━", "┈"), ("#", ".")


def _shows(encoding: str) -> bool:
    try:
        "".join(_BLOCKS).encode(encoding)
    except (UnicodeError, LookupError):
        return False
    return True


def _fitted(parts: list[str], width: int) -> str:
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line
