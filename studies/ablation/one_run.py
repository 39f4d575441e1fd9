"""One run of the study: trains, and counts the network's evaluations."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from twostep.data.cache.build import open_cache
from twostep.distill.trainer import Trainer
from twostep.recipe.schema import Recipe
from twostep.runtime.files import replace_folder, write_json


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
        trainer = Trainer(recipe, open_cache(recipe))
        trainer.train()
    if recipe.score.fit_turns:
        _save_score(trainer, folder / "score")
    record = {
        "seconds": round(time.monotonic() - started, 1),
        "evaluations": trainer.progress.evaluations,
        "best_turn": trainer.progress.best_turn,
    }
    for leftover in ("checkpoints", "samples", "best"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    write_json(folder / "done.json", record)
    return f"{folder.name}: {record['seconds']:.0f} s"


def _save_score(trainer: Trainer, folder: Path) -> None:
    """The fitted score as a model folder: the teacher's, with another transformer."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    teacher = trainer.cache.spec.teacher.base
    shutil.copytree(teacher, temporary, ignore=shutil.ignore_patterns("transformer"))
    transformer: Any = trainer.roles.score.transformer()
    transformer.save_pretrained(temporary / "transformer")
    replace_folder(temporary, folder)
