"""A training stage with a time budget that survives being stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

SAVE_EVERY_SECONDS = 120.0


class TimedRun:
    """Iterates for `minutes`, yielding the fraction of the budget used, and saves as it goes.

    Args:
        checkpoint: file of the stage's state; a run that finds it goes on where it stopped.
        minutes: training time, summed over all the sittings.
        state: objects with `state_dict` and `load_state_dict`, by name.

    Attributes:
        values: what to show; a record of them goes to `CHECKPOINT.jsonl` every 20 seconds.
    """

    def __init__(self, checkpoint: Path, minutes: float, state: dict[str, Any]) -> None:
        self.checkpoint, self.state, self.steps, self.spent = checkpoint, state, 0, 0.0
        self.budget = 60.0 * minutes
        self.values: dict[str, float] = {}
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            self.steps, self.spent = saved["steps"], saved["spent"]
            for name, part in state.items():
                part.load_state_dict(saved[name])

    def save(self) -> None:
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        parts = {name: part.state_dict() for name, part in self.state.items()}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(parts | {"steps": self.steps, "spent": self.spent}, temporary)
        os.replace(temporary, self.checkpoint)

    def _record(self) -> None:
        entry = {"seconds": round(self.spent, 1), "step": self.steps, **self.values}
        with self.checkpoint.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def __iter__(self) -> Iterator[float]:
        stage = self.checkpoint.stem
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        last_save = last_print = last = time.monotonic()
        with Progress(*columns) as bars:
            bar = bars.add_task(stage, total=self.budget, completed=self.spent)
            while self.spent < self.budget:
                yield self.spent / self.budget
                now = time.monotonic()
                # A suspended machine does not spend the budget.
                self.spent, last = self.spent + min(now - last, 10.0), now
                self.steps += 1
                message = " ".join(f"{k} {v:.4f}" for k, v in self.values.items())
                bars.update(bar, completed=self.spent, description=f"{stage} {message}")
                if now - last_print > 20:
                    if not bars.console.is_terminal:
                        print(f"{stage} {self.spent:.0f}s step {self.steps} {message}", flush=True)
                    self._record()
                    last_print = now
                if now - last_save > SAVE_EVERY_SECONDS:
                    self.save()
                    last_save = now
        self._record()
        self.save()


def warm_then_linear(progress: float, step: int, warmup_steps: int, hold: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up, constant until `hold`, then linear to 1% at the end."""
    decay = 1.0 if progress < hold else max(0.01, (1.0 - progress) / (1.0 - hold))
    return min(1.0, (step + 1) / warmup_steps) * decay


class Average:
    """Running average of parameters in fp32, with a horizon that grows as 0.05 of the run."""

    def __init__(self, parameters: list[torch.nn.Parameter], horizon: float = 0.05) -> None:
        self.parameters, self.horizon, self.steps = parameters, horizon, 0
        self.values = [p.detach().clone() for p in parameters]

    def update(self) -> None:
        self.steps += 1
        weight = 1.0 / (1.0 + self.horizon * self.steps)
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], weight)

    def copy_to_parameters(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.values, strict=True):
                parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)
