"""How a run ended: what was refused, and whether what it made is worth having."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twostep.distill.checkpoint import Progress
from twostep.errors import UserError

# The best validation's distance, against that of the teacher's own weights in two steps.
_WORSE, _CHANCE = 1.5, 0.1
# The spread of its latents, against the teacher's.
_SPREAD = (0.5, 2.0)
# The score's loss at the end of its fit, against that of its first turns.
_SCORE_WORSE = 2.0


class Diverged(UserError):
    """A run that ended, with a student that is worse than what it began with."""

    exit_code = 3


@dataclass(frozen=True)
class Outcome:
    """What a run says of itself in the end, in `run.json` and on the student's card.

    Attributes:
        skipped: updates that were refused since something was not finite, by kind.
        diverged: in what way, a phrase each.
    """

    turns: int
    best_turn: int | None
    skipped: Mapping[str, int]
    diverged: tuple[str, ...]

    @staticmethod
    def of(progress: Progress) -> Outcome:
        """Of a run at its end."""
        found = []
        best, start = progress.best_metrics, progress.start_distance
        distance = best.get("kernel_distance")
        # Of two equal sets the estimate is as often below zero as above.
        bound = math.inf if start is None else _WORSE * max(start, 0.0) + _CHANCE
        if distance is not None and distance > bound:
            found.append(
                f"its best validation is at distance {distance:.3g} from the teacher, the "
                f"teacher's own weights in two steps at {start:.3g}"
            )
        spread = best.get("latents_std")
        if spread is not None and not _SPREAD[0] <= spread <= _SPREAD[1]:
            found.append(f"its latents spread {spread:.3g} times as far as the teacher's")
        first, last = progress.score_start, progress.score_loss
        if first is not None and last is not None and not last <= _SCORE_WORSE * first:
            found.append(
                f"the score's loss rose from {first:.3g} to {last:.3g} while it was fitted"
            )
        return Outcome(progress.turn, progress.best_turn, dict(progress.skipped), tuple(found))

    def as_dict(self) -> dict[str, Any]:
        """For `run.json`."""
        return {
            "turns": self.turns,
            "best_turn": self.best_turn,
            "skipped": dict(self.skipped),
            "diverged": list(self.diverged),
        }

    def in_words(self) -> str:
        """How it went, for a line."""
        return f"{self.turns} turns, {'diverged' if self.diverged else 'finished'}"

    def warnings(self) -> list[str]:
        """What should be said, a line each."""
        lines = [
            f"refused since something in them was not finite: {count} turns of the run ({kind})"
            for kind, count in self.skipped.items()
        ]
        return lines + [f"the run diverged: {phrase}" for phrase in self.diverged]

    def check(self) -> None:
        """Raises Diverged if it did."""
        if self.diverged:
            raise Diverged(
                f"the run diverged: {'; '.join(self.diverged)}. The student is written, but "
                "begin a new run with lower rates"
            )


def followed(before: float | None, value: float, *, keep: float = 0.7) -> float:
    """A running mean; what is not finite stays."""
    if before is None or not math.isfinite(value):
        return value
    return keep * before + (1 - keep) * value
