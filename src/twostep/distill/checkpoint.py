"""Checkpoints: everything a run needs to go on, in safetensors and JSON, written atomically."""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twostep.distill.ema import Ema
from twostep.distill.optimizers import make_states
from twostep.distill.tensor_files import (
    check_whole,
    load_tensors,
    save_folder,
    save_in_background,
    save_tensors,
    stored_names,
)
from twostep.errors import UserError
from twostep.runtime.checksums import write_sums
from twostep.runtime.distributed import World
from twostep.runtime.files import let_read, make_folder, writing

# 2: networks without a wrapper around them, random numbers in named streams.
# 3: a fitted score lies beside the checkpoints, not in each.
VERSION = 3
_NAME = re.compile(r"(fit|turn)-(\d{7})$")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be read; the message names it."""


@dataclass
class Progress:
    """Where a run stands. Randomness and data order follow from the turns (see `draws.py`).

    Attributes:
        evaluations: forwards of one sample through any network in the student's turns; one whose
            result is differentiated counts as three, validation does not count.
        fit_evaluations: the same while the score is fitted.
        skipped, skipped_in_a_row: updates that were refused since something was not finite, by what
            they were of: score, critic, student (joint turns too), validation.
        best_distance: the least kernel distance of a validation, after `best_turn` turns; with
            `training.best_by: score` the highest score, negative.
        best_metrics: of that validation.
        start_distance: the kernel distance of the teacher's own weights in two steps.
        score_start, score_loss: the score's loss when its fit began, and lately.
    """

    score_turn: int = 0
    turn: int = 0
    critic_turn: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)
    evaluations: int = 0
    fit_evaluations: int = 0
    best_distance: float | None = None
    best_turn: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    start_distance: float | None = None
    score_start: float | None = None
    score_loss: float | None = None

    def count(self, kind: str, *, accepted: bool) -> int:
        """Counts an update of a kind; how many of it were refused in a row."""
        if accepted:
            self.skipped_in_a_row.pop(kind, None)
            return 0
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        self.skipped_in_a_row[kind] = self.skipped_in_a_row.get(kind, 0) + 1
        return self.skipped_in_a_row[kind]

    def restore(self, record: dict[str, Any]) -> None:
        """As a checkpoint has it; earlier ones have one counter for all kinds."""
        for name in ("skipped", "skipped_in_a_row"):
            if isinstance(record.get(name), int):
                record = record | {name: {"student": record[name]} if record[name] else {}}
        self.__dict__.update(record)


@dataclass(frozen=True)
class _Writing:
    """A checkpoint without its name yet; `future` is None once its tensors are written."""

    temporary: Path
    target: Path
    keep: int
    future: Future[Any] | None

    def is_done(self) -> bool:
        return self.future is None or self.future.done()

    def commit(self) -> None:
        write_sums(self.temporary)
        for path in (*self.temporary.iterdir(), self.temporary):
            _sync(path)
        shutil.rmtree(self.target, ignore_errors=True)
        let_read(self.temporary)
        os.replace(self.temporary, self.target)
        for old in list_checkpoints(self.target.parent)[: -self.keep]:
            shutil.rmtree(old)


@dataclass
class TrainingState:
    """All that changes while training.

    `facts` say whose state it is: `recipe`, and `data`, the cache's fingerprint.
    What has learnt and is frozen from then on is written once, beside the checkpoints (`freeze`).
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema
    progress: Progress
    frozen: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    _writing: _Writing | None = None

    def freeze(self, name: str, folder: Path, world: World) -> None:
        """Writes a module to `folder/name`; no checkpoint holds it after. For all processes."""
        save_folder(self.modules[name].state_dict(), folder / name, world)
        self._leave_out(name)

    def _leave_out(self, name: str) -> None:
        del self.modules[name], self.optimizers[name]
        self.frozen.append(name)

    def save(self, folder: Path, keep: int, world: World, *, background: bool = False) -> Path:
        """Writes `folder/turn-NNNNNNN`, then removes all but the last `keep` checkpoints.

        While the score is fitted, before the first turn, its name is `fit-NNNNNNN`.
        Among several processes each writes its part; all must call it.

        Args:
            background: copy the tensors and write while training goes on; the checkpoint gets its
                name with the first call of `settle` after that.
        """
        self.settle(world, wait=True)
        progress = self.progress
        name = f"turn-{progress.turn:07d}" if progress.turn else f"fit-{progress.score_turn:07d}"
        target = folder / name
        temporary = folder / f".{target.name}.tmp"
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            make_folder(temporary)
            record = {
                "version": VERSION,
                "progress": asdict(self.progress),
                "frozen": self.frozen,
                "facts": self.facts,
                "ema_updates": self.ema.updates,
                "optimizer_groups": {
                    name: optimizer.state_dict()["param_groups"]
                    for name, optimizer in self.optimizers.items()
                },
            }
            with writing(target):
                (temporary / "state.json").write_text(json.dumps(record, indent=1))
        world.wait()
        start = save_in_background if background else save_tensors
        with writing(target):
            written = start(self._tensors(), temporary, "state.safetensors", world)
        self._writing = _Writing(temporary, target, keep, written)
        if not background:
            self.settle(world, wait=True)
        return target

    def settle(self, world: World, wait: bool = False) -> None:
        """Gives a checkpoint that is written by now its name.

        Args:
            wait: for one that is still being written; all processes must call it then.
        """
        unnamed = self._writing
        if unnamed is not None and (wait or unnamed.is_done()):
            self._writing = None
            with writing(unnamed.target):
                if unnamed.future is not None:
                    unnamed.future.result()
                if world.is_first:
                    unnamed.commit()
        if wait:
            world.wait()

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, the live ones."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                tensors[f"module/{name}/{key}"] = value
        for name, optimizer in self.optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                for key, value in values.items():
                    tensors[f"optimizer/{name}/{index}/{key}"] = value
        for index, value in enumerate(self.ema.values):
            tensors[f"ema/{index}"] = value
        return tensors

    def load(self, checkpoint: Path, frozen: Path) -> None:
        """Restores everything in place, whatever the number of processes that wrote it.

        Args:
            frozen: where `freeze` wrote.

        Raises:
            CheckpointError: if it is damaged or belongs to another recipe.
        """
        try:
            check_whole(checkpoint)
            record = json.loads((checkpoint / "state.json").read_text())
            if record.get("version", 1) != VERSION:
                raise ValueError(
                    f"it has format {record.get('version', 1)}, as an earlier twostep wrote it; "
                    f"this version goes on from format {VERSION} only. Finish the run with the "
                    "version that began it, or begin a new one"
                )
            for name in record["frozen"]:
                check_whole(frozen / name)
                load_tensors(self.modules[name].state_dict(), frozen / name)
                self._leave_out(name)
            names = stored_names(checkpoint)
            for name, optimizer in self.optimizers.items():
                make_states(optimizer, f"optimizer/{name}/", names)
                for group, saved in zip(
                    optimizer.param_groups, record["optimizer_groups"][name], strict=True
                ):
                    group.update({k: v for k, v in saved.items() if k != "params"})
            tensors = self._tensors()
            if tensors.keys() != names:
                raise ValueError(f"it holds other tensors: {sorted(tensors.keys() ^ names)[:3]}")
            load_tensors(tensors, checkpoint)
            self.ema.updates = record["ema_updates"]
            self.progress.restore(record["progress"])
        except Exception as error:
            raise CheckpointError(f"{checkpoint} cannot be resumed: {error}") from error


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its run; nothing in those of earlier versions.

    Raises:
        CheckpointError: if its record cannot be read.
    """
    path = checkpoint / "state.json"
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no ordinary file")
    try:
        facts = json.loads(path.read_text(encoding="utf-8")).get("facts", {})
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return facts if isinstance(facts, dict) else {}


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
