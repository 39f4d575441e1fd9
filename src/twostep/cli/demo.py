"""`twostep demo`: the whole path on the embedded teacher, within a given time."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from twostep.data.cache.build import open_cache
from twostep.distill.run_folder import RunFolder
from twostep.distill.trainer import Trainer
from twostep.evaluation.evaluate import Settings, contenders, evaluate
from twostep.evaluation.prompts import PromptSet
from twostep.recipe.schema import (
    Recipe,
)

RECIPE = "zoo:emoji-demo"
SHIPPED = "zoo:emoji-student"
# Generating and judging the evaluation's sets, in units of one cached teacher sample.
_SAMPLES_PER_EVALUATED_IMAGE = 4.5
_EVALUATION_OVERHEAD_SECONDS = 40.0
# Random halves behind each interval: enough for two digits, done in seconds.
_HALVES = 40


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
    run = RunFolder(out)
    if run.report.exists():  # a finished demo starts anew; an interrupted one goes on
        run.clear()
    console.print("[bold]1/3[/] caching the teacher's samples")
    cache = open_cache(recipe)
    seconds_per_sample = (time.monotonic() - started) / len(cache)
    evaluation = images * _SAMPLES_PER_EVALUATED_IMAGE * min(seconds_per_sample, 0.2)
    left = 60 * minutes - (time.monotonic() - started) - evaluation - _EVALUATION_OVERHEAD_SECONDS
    training_minutes = max(left / 60, 0.25 * minutes)
    recipe = Recipe.load(RECIPE, [*overrides, f"training.minutes={training_minutes:.2f}"])
    console.print(f"[bold]2/3[/] distilling for {training_minutes:.1f} minutes")
    trainer = Trainer(recipe, cache)
    student = trainer.train()
    console.print("[bold]3/3[/] evaluating on held-out prompts")
    models = contenders(
        recipe.teacher.model, recipe.teacher.steps, {"student": str(student), "shipped": SHIPPED}
    )
    size = (recipe.data.height, recipe.data.width)
    prompts = PromptSet.load("emoji", images)
    comparison = evaluate(models, prompts, out / "images", Settings(size=size, halves=_HALVES))
    assert comparison is not None  # the demo is one process
    facts = {
        "command": f"twostep demo --minutes {minutes:g}",
        "minutes": round((time.monotonic() - started) / 60, 2),
        "turns": trainer.progress.turn,
        "best_turn": trainer.progress.best_turn,
        "recipe": recipe.model_dump(mode="json"),
    }
    title = "Two steps from eight: the embedded teacher"
    comparison.write(run.report, facts, run.metrics(), title)
    return run.report
