"""One run of the study: trains, and counts the network's evaluations."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from twostep.distill.trainer import Trainer
from twostep.families.zimage import Prediction
from twostep.models.folder import (
    resolve,
)
from twostep.recipe.schema import (
    Recipe,
)
from twostep.runtime.files import replace_folder, write_atomically

# A call whose result is differentiated costs about two forwards more.
_WITH_GRADIENT = 3


class CountingTrainer(Trainer):
    """Counts evaluations for each image, those of validation left out.

    The count is of this process: a run that was interrupted is begun anew by the study.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.evaluations, self._counting = 0, False
        roles: list[Any] = list(self.roles.by_name().values())
        for role in roles:
            role._forward = self._counted(role._forward)

    def _counted(self, forward: Callable[..., Prediction]) -> Callable[..., Prediction]:
        def call(latents: torch.Tensor, *rest: Any) -> Prediction:
            output = forward(latents, *rest)
            if self._counting:
                cost = _WITH_GRADIENT if output.velocity.requires_grad else 1
                self.evaluations += cost * len(latents)
            return output

        return call

    def _one_turn(self) -> dict[str, float]:
        self._counting = True
        try:
            return super()._one_turn()
        finally:
            self._counting = False


def run(recipe: Recipe, threads: int) -> str:
    """Trains unless it was done before; leaves `student/`, `metrics.jsonl` and `done.json`.

    For a process that makes several runs: what was compiled for one serves the next.
    """
    folder = recipe.run_folder
    if (folder / "done.json").exists():
        return f"{folder.name}: done before"
    torch.set_num_threads(threads)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("w", encoding="utf-8") as log, redirect_stderr(log):
        started = time.monotonic()
        trainer = CountingTrainer(recipe)
        trainer.train()
    if recipe.score.fit_turns:
        _save_score(trainer, folder / "score")
    record = {
        "seconds": round(time.monotonic() - started, 1),
        "evaluations": trainer.evaluations,
        "best_turn": trainer.progress.best_turn,
    }
    for leftover in ("checkpoints", "samples", "best"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    text = json.dumps(record)
    write_atomically(folder / "done.json", lambda p: p.write_text(text))
    return f"{folder.name}: {record['seconds']:.0f} s"


def _save_score(trainer: Trainer, folder: Path) -> None:
    """The fitted score as a model folder: the teacher's, with another transformer."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    teacher = resolve(trainer.recipe.teacher.model)
    shutil.copytree(teacher, temporary, ignore=shutil.ignore_patterns("transformer"))
    transformer: Any = trainer.roles.score.transformer()
    transformer.save_pretrained(temporary / "transformer")
    replace_folder(temporary, folder)
