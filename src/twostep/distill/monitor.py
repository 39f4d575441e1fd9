"""Metrics on disk, and alarms for the known ways in which distillation fails."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostep.runtime.files import WriteError, write_text, writing

if TYPE_CHECKING:
    from twostep.distill.trackers import Trackers

# Bounds outside which a run is in trouble, and what to try (docs/method.md, failure modes).
_ALARMS = {
    "critic/accuracy_final": (
        None,
        0.95,
        "the critic wins: lower its rate, or the adversarial weight",
    ),
    "validation/latents_std": (0.8, 1.25, "latents saturate or fade: lower the learning rate"),
    "validation/latents_mean": (-0.2, 0.2, "latents drift: lower the learning rate"),
    "validation/diversity": (0.6, None, "seeds look alike: raise distribution matching"),
}
_SMOOTHING = 0.9


class Monitor:
    """Appends records to `metrics.jsonl` and to trackers, and tells when an alarm begins."""

    def __init__(self, folder: Path, resume_at: int, trackers: Trackers | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        _forget_after(self.path, resume_at)
        self._smooth: dict[str, float] = {}
        self._ringing: set[str] = set()
        self._trackers = trackers

    def record(self, turn: int, values: dict[str, float]) -> list[str]:
        """Logs `values` and returns the alarms that begin with them."""
        begun = []
        for key, (low, high, advice) in _ALARMS.items():
            if key not in values:
                continue
            value = values[key]
            if key.startswith("critic/"):  # one batch tells little
                value = _SMOOTHING * self._smooth.get(key, value) + (1 - _SMOOTHING) * value
                self._smooth[key] = value
            outside = (low is not None and value < low) or (high is not None and value > high)
            if outside and key not in self._ringing:
                begun.append(f"turn {turn}: {key} is {value:.3f}; {advice}")
            (self._ringing.add if outside else self._ringing.discard)(key)
        entry: dict[str, Any] = {"turn": turn, **values}
        if begun:
            entry["alarms"] = begun
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self._trackers is not None:
            self._trackers.log(turn, values)
        return begun

    def sheet(self, turn: int, path: Path) -> None:
        """A sample sheet, to the trackers."""
        if self._trackers is not None and path.is_file():
            self._trackers.sheet(turn, path)

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, oldest first."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    return [record for _, record in _records(path)]


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines with their records; a torn line, or another's, is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            record = json.loads(line)
            int(record["turn"])
            found.append((line, record))
    return found


def _forget_after(path: Path, turn: int) -> None:
    """A run that goes on from `turn` will write later records again."""
    if path.exists() and not path.is_file():
        raise WriteError(f"{path} is no ordinary file; remove it")
    if path.exists():
        kept = [line for line, record in _records(path) if record["turn"] <= turn]
        write_text(path, "".join(f"{line}\n" for line in kept))
