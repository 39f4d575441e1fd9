"""One run of the study: trains, judges, and keeps figures in place of weights."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import judging
import torch
from judging import Test

from twostep.data.cache.build import open_cache
from twostep.distill.monitor import read_metrics
from twostep.distill.trainer import Trainer
from twostep.distill.update import TrainingStopped
from twostep.recipe.schema import Recipe
from twostep.runtime.files import replace_folder, write_json


def run(recipe: Recipe, test: Test, threads: int) -> str:
    """Unless it was done before; leaves `judged.safetensors`, `metrics.jsonl` and `done.json`.

    A run that diverges is a finding: its `done.json` says so. For a process that makes several
    runs: what was compiled for one serves the next.
    """
    folder = recipe.run_folder
    if (folder / "done.json").exists():
        return f"{folder.name}: done before"
    record: dict[str, Any] = {}
    started = time.monotonic()
    try:
        trainer = _train(recipe, threads)
        record["evaluations"] = trainer.progress.evaluations
        record["train_seconds"] = round(time.monotonic() - started, 1)
        record["diverged"] = trainer.outcome.diverged
        judging.keep(
            judging.judge(str(folder / "student"), test, steps=None), folder / "judged.safetensors"
        )
    except TrainingStopped as error:
        record["diverged"], record["error"] = True, str(error)
    record["curve"] = [
        {k: v for k, v in line.items() if k.startswith(("turn", "critic/", "gradient_norm/"))}
        for line in read_metrics(folder)
    ]
    record["seconds"] = round(time.monotonic() - started, 1)
    _end(folder, record)
    return f"{folder.name}: {record['seconds']:.0f} s"


def fit(recipe: Recipe, threads: int) -> str:
    """Fits a score unless it was done before; leaves `score/` and `done.json`."""
    folder = recipe.run_folder
    if (folder / "done.json").exists():
        return f"{folder}: done before"
    started = time.monotonic()
    trainer = _train(recipe, threads)
    _save_score(trainer, folder / "score")
    record = {
        "evaluations": trainer.progress.fit_evaluations,
        "seconds": round(time.monotonic() - started, 1),
    }
    _end(folder, record)
    return f"{folder}: {record['seconds']:.0f} s"


def _end(folder: Path, record: dict[str, Any]) -> None:
    """Lets the weights go and says that the run is done."""
    for leftover in ("checkpoints", "samples", "best", "student"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    write_json(folder / "done.json", record)


def _train(recipe: Recipe, threads: int) -> Trainer:
    folder = recipe.run_folder
    torch.set_num_threads(threads)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("w", encoding="utf-8") as log, redirect_stderr(log):
        trainer = Trainer(recipe, open_cache(recipe))
        trainer.train()
    return trainer


def _save_score(trainer: Trainer, folder: Path) -> None:
    """The fitted score as a model folder: the teacher's, with another transformer."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    teacher = trainer.cache.spec.teacher.base
    shutil.copytree(teacher, temporary, ignore=shutil.ignore_patterns("transformer"))
    transformer: Any = trainer.roles.score.transformer()
    transformer.save_pretrained(temporary / "transformer")
    replace_folder(temporary, folder)
