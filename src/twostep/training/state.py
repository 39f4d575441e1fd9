"""Checkpoints: everything a run needs to go on, in safetensors and JSON, written atomically."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twostep.errors import UserError
from twostep.training.ema import Ema

_NAME = re.compile(r"turn-(\d{7})$")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be read; the message names it."""


@dataclass
class Progress:
    """Where a run stands. Randomness and data order follow from `turn` (see `draws.py`)."""

    turn: int = 0
    critic_turn: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_score: float | None = None
    best_turn: int | None = None


@dataclass
class TrainingState:
    """All that changes while training."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema
    progress: Progress

    def save(self, folder: Path, keep: int) -> Path:
        """Writes `folder/turn-NNNNNNN`, then removes all but the last `keep` checkpoints."""
        target = folder / f"turn-{self.progress.turn:07d}"
        temporary = folder / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors, groups = self._collect()
        save_file(tensors, temporary / "state.safetensors")
        record = {
            "progress": asdict(self.progress),
            "ema_updates": self.ema.updates,
            "optimizer_groups": groups,
        }
        (temporary / "state.json").write_text(json.dumps(record, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
        return target

    def _collect(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                tensors[f"module/{name}/{key}"] = value
        groups: dict[str, Any] = {}
        for name, optimizer in self.optimizers.items():
            state = optimizer.state_dict()
            groups[name] = state["param_groups"]
            for index, values in state["state"].items():
                for key, value in values.items():
                    tensors[f"optimizer/{name}/{index}/{key}"] = torch.as_tensor(value)
        for index, value in enumerate(self.ema.values):
            tensors[f"ema/{index}"] = value
        # Own memory for each: safetensors refuses tensors that share storage.
        return {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, groups

    def load(self, checkpoint: Path) -> None:
        """Restores everything in place.

        Raises:
            CheckpointError: if it is damaged or belongs to another recipe.
        """
        try:
            record = json.loads((checkpoint / "state.json").read_text())
            tensors = load_file(checkpoint / "state.safetensors")
            for name, module in self.modules.items():
                module.load_state_dict(_under(tensors, f"module/{name}/"))
            for name, optimizer in self.optimizers.items():
                state: dict[int, dict[str, Tensor]] = {}
                for key, value in _under(tensors, f"optimizer/{name}/").items():
                    number, field = key.split("/", 1)
                    state.setdefault(int(number), {})[field] = value
                groups = record["optimizer_groups"][name]
                optimizer.load_state_dict({"state": state, "param_groups": groups})
            for index, value in enumerate(self.ema.values):
                value.copy_(tensors[f"ema/{index}"])
            self.ema.updates = record["ema_updates"]
            self.progress.__dict__.update(record["progress"])
        except Exception as error:
            raise CheckpointError(f"{checkpoint} cannot be resumed: {error}") from error


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; half-written ones are not among them."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.match(p.name))
