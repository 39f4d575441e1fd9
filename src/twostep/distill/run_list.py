"""Runs by their folders: what ran, how far it came, what was best, how it ended. Needs no torch."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from twostep.distill.monitor import read_metrics
from twostep.runtime.files import is_alive
from twostep.runtime.locks import Holder, is_held

State = Literal["running", "finished", "diverged", "stopped"]


@dataclass(frozen=True)
class RunSummary:
    """A run's folder in a line.

    Attributes:
        turn, turns: of the student, done and wanted; below 0 while the score is fitted.
        best_turn, distance: of the validation of the least distance to the teacher; None before
            the first.
        seconds_ago: since the last record.
    """

    folder: str
    teacher: str
    state: State
    turn: int
    turns: int
    best_turn: int | None
    distance: float | None
    seconds_ago: float | None
    student: str | None

    @property
    def share(self) -> float:
        """Of its turns, 0 to 1."""
        return min(1.0, max(0, self.turn) / max(1, self.turns))

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


def list_runs(folder: Path) -> Iterator[RunSummary]:
    """The runs in a folder, or the one that it is; by their names."""
    for path in (folder, *sorted(folder.iterdir() if folder.is_dir() else ())):
        if (path / "run.json").is_file() and (path / "recipe.yaml").is_file():
            yield summarise(path)


def summarise(path: Path) -> RunSummary:
    """One run."""
    said, recipe = _json(path / "run.json"), _recipe(path / "recipe.yaml")
    records = read_metrics(path)
    outcome = said.get("outcome")
    checked = [
        (float(record["validation/kernel_distance"]), int(record["turn"]))
        for record in records
        if isinstance(record.get("validation/kernel_distance"), int | float)
    ]
    distance, best = min(checked, default=(None, None))
    metrics = path / "metrics.jsonl"
    student = path / "student"
    return RunSummary(
        folder=str(path),
        teacher=str(recipe.get("teacher", {}).get("model", "")),
        state=_state(path, outcome),
        turn=int(records[-1]["turn"]) if records else 0,
        turns=int(recipe.get("training", {}).get("turns", 0)),
        best_turn=best,
        distance=distance,
        seconds_ago=time.time() - metrics.stat().st_mtime if metrics.is_file() else None,
        student=str(student) if student.is_dir() else None,
    )


def _state(path: Path, outcome: Any) -> State:
    if is_held(path):
        holder = Holder.of(path)
        if holder.host != socket.gethostname() or is_alive(holder.process):
            return "running"
    if not isinstance(outcome, dict):
        return "stopped"
    return "diverged" if outcome.get("diverged") else "finished"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _recipe(path: Path) -> dict[str, Any]:
    """As it was written, of earlier versions too."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
