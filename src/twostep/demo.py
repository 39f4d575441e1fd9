"""`twostep demo`: the whole path on the embedded teacher, within a given time."""

from __future__ import annotations

import json
import shutil
import time
from datetime import date
from pathlib import Path

from rich.console import Console

from twostep.backbones.model import ZOO
from twostep.config import Recipe
from twostep.evaluation.compare import compare
from twostep.evaluation.report import write_report
from twostep.files import write_atomically
from twostep.provenance import git_commit, machine
from twostep.sampler import Sampler
from twostep.teach import teach
from twostep.training.loop import Trainer
from twostep.training.monitor import read_metrics

RECIPE = ZOO / "emoji-demo.yaml"
SHIPPED = "zoo:emoji-student"
# Generating and judging the evaluation's sets, in units of one cached teacher sample.
_SAMPLES_PER_EVALUATED_IMAGE = 4.5
_EVALUATION_OVERHEAD_SECONDS = 20.0


def run_demo(minutes: float, out: Path, images: int) -> Path:
    """Caches, distils, evaluates; returns the path of `report.json`, `report.html` beside it.

    Args:
        minutes: for everything; what caching and evaluation leave goes to distilling.
        images: held-out images per model.
    """
    console = Console(stderr=True)
    started = time.monotonic()
    overrides = [f"output={out.parent}", f"name={out.name}", f"data.cache={out}/cache"]
    recipe = Recipe.load(RECIPE, overrides)
    if (out / "report.json").exists():  # a finished demo starts anew; an interrupted one goes on
        for name in ("checkpoints", "samples", "student"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("report.json", "report.html", "metrics.jsonl", "best.safetensors"):
            (out / name).unlink(missing_ok=True)
    console.print("[bold]1/3[/] caching the teacher's samples")
    cache = teach(recipe)
    seconds_per_sample = (time.monotonic() - started) / len(cache)
    evaluation = images * _SAMPLES_PER_EVALUATED_IMAGE * min(seconds_per_sample, 0.2)
    left = 60 * minutes - (time.monotonic() - started) - evaluation - _EVALUATION_OVERHEAD_SECONDS
    training_minutes = max(left / 60, 0.25 * minutes)
    recipe = Recipe.load(RECIPE, [*overrides, f"training.minutes={training_minutes:.2f}"])
    console.print(f"[bold]2/3[/] distilling for {training_minutes:.1f} minutes")
    trainer = Trainer(recipe)
    student = trainer.train()
    console.print("[bold]3/3[/] evaluating on held-out prompts")
    students = {"student_2": Sampler.load(str(student)), "shipped_2": Sampler.load(SHIPPED)}
    comparison = compare(
        Sampler.load(recipe.teacher.model),
        students,
        images,
        (recipe.data.height, recipe.data.width),
        recipe.teacher.steps,
        lambda stage: console.print(f"    {stage}", highlight=False),
    )
    report = comparison.figures | {
        "command": f"twostep demo --minutes {minutes:g}",
        "commit": git_commit(),
        "machine": machine(),
        "date": date.today().isoformat(),
        "minutes": round((time.monotonic() - started) / 60, 2),
        "turns": trainer.progress.turn,
        "best_turn": trainer.progress.best_turn,
        "recipe": recipe.model_dump(mode="json"),
    }
    path = out / "report.json"
    text = json.dumps(report, indent=2, ensure_ascii=False)
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
    write_report(
        out, report, comparison.panels, comparison.captions, read_metrics(out),
        "Two steps from eight: the embedded teacher",
    )  # fmt: skip
    return path
