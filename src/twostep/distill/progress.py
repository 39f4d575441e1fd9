"""The progress bar of a training run."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from twostep.distill.objectives.terms import TERMS

_SHOWN = {
    "loss": "loss",
    **{f"final/{term.name}": term.short for term in TERMS if term.short},
    "critic/accuracy_final": "critic",
    "score/flow_matching": "score",
    "validation/kernel_distance": "distance",
    "validation/diversity": "diversity",
}
# Where the output is no terminal, a line this often.
_LINE_SECONDS = 30.0


class TurnProgress:
    """Turns, losses and time left, on stderr."""

    def __init__(
        self, turns: int, minutes: float | None, fit_turns: int = 0, hidden: bool = False
    ) -> None:
        self.turns, self.minutes, self.fit_turns = turns, minutes, fit_turns
        self.console = Console(stderr=True, quiet=hidden)
        self._bars = Progress(
            TextColumn("distil"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]} {task.fields[losses]}"), console=self.console,
        )  # fmt: skip
        self._latest: dict[str, float] = {}
        self._last_line = 0.0

    def __enter__(self) -> TurnProgress:
        self._bars.start()
        self._task = self._bars.add_task("", total=self.turns + self.fit_turns, left="", losses="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def print(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text)

    def show(self, turn: int, seconds: float, values: dict[str, float]) -> None:
        """Updates the bar after `turn` turns, `seconds` into the run; below 0: of the score."""
        self._latest |= {k: v for k, v in values.items() if k in _SHOWN}
        done = turn + self.fit_turns
        left = (self.turns - turn) * seconds / max(done, 1)
        if self.minutes is not None:
            left = min(left, 60 * self.minutes - seconds)
        losses = " ".join(f"{_SHOWN[k]} {v:.3g}" for k, v in self._latest.items())
        time_left = f"{max(0, left) / 60:.1f} min left"
        self._bars.update(self._task, completed=done, left=time_left, losses=losses)
        if not self.console.is_terminal and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(
                f"turn {turn}, {seconds:.0f} s, {time_left}, {losses}", highlight=False
            )
