"""`twostep demo`: the whole path on the embedded teacher, within a given time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from twostep.cli.console import say, strong

# Generating and judging the evaluation's sets, in units of one cached teacher sample.
_SAMPLES_PER_EVALUATED_IMAGE = 4.5
_EVALUATION_OVERHEAD_SECONDS = 40.0
# Random halves behind each interval: enough for two digits, done in seconds.
_HALVES = 40
_TITLE = "Two steps from eight: the embedded teacher"


def demo(
    minutes: Annotated[
        float, typer.Option(min=0.1, help="time for all of it: cache, distilling, evaluation")
    ] = 12.0,
    out: Annotated[Path, typer.Option(help="folder for the run and its report")] = Path(
        "runs/demo"
    ),
    images: Annotated[int, typer.Option(min=16, help="held-out images to evaluate on")] = 512,
) -> None:
    """Distil the embedded teacher into two steps and report how close the student comes.

    Example: twostep demo --minutes 12
    """
    from twostep.data.cache import build
    from twostep.distill.run_folder import RunFolder
    from twostep.distill.trainer import Trainer
    from twostep.evaluation import entries, evaluate
    from twostep.evaluation.prompts import PromptSet
    from twostep.recipe.schema import Recipe

    started = time.monotonic()
    overrides = [f"output={out.parent}", f"name={out.name}", f"data.cache={out}/cache"]
    recipe = Recipe.load("zoo:emoji-demo", overrides)
    run = RunFolder(out)
    if run.report.exists():  # a finished demo starts anew; an interrupted one goes on
        run.clear()
    strong("1/3 caching the teacher's samples")
    cache = build.open_cache(recipe)
    seconds = time.monotonic() - started
    training_minutes = _minutes_left(
        minutes, spent=seconds, seconds_per_sample=seconds / len(cache), images=images
    )
    recipe = Recipe.load("zoo:emoji-demo", [*overrides, f"training.minutes={training_minutes:.2f}"])
    strong(f"2/3 distilling for {training_minutes:.1f} minutes")
    trainer = Trainer(recipe, cache)
    student = trainer.train()
    strong("3/3 evaluating on held-out prompts")
    students = {"student": str(student), "shipped": "zoo:emoji-student"}
    request = evaluate.EvaluationRequest(
        entries=entries.list_entries(recipe.teacher.model, recipe.teacher.steps, students),
        prompts=PromptSet.load("emoji", images),
        size=(recipe.data.height, recipe.data.width),
        halves=_HALVES,
    )
    comparison = evaluate.evaluate(request, out / "images")
    assert comparison is not None  # the demo is one process
    facts = {
        "command": f"twostep demo --minutes {minutes:g}",
        "minutes": round((time.monotonic() - started) / 60, 2),
        "turns": trainer.progress.turn,
        "best_turn": trainer.progress.best_turn,
        "recipe": recipe.model_dump(mode="json"),
    }
    comparison.write(run.report, facts, curves=run.metrics(), title=_TITLE)
    say(f"report: {run.report.with_suffix('.html')}\n        {run.report}")


def _minutes_left(minutes: float, *, spent: float, seconds_per_sample: float, images: int) -> float:
    """What caching, in `spent` seconds, and evaluation leave of `minutes` to distilling."""
    evaluation = images * _SAMPLES_PER_EVALUATED_IMAGE * min(seconds_per_sample, 0.2)
    left = 60 * minutes - spent - evaluation - _EVALUATION_OVERHEAD_SECONDS
    return max(left / 60, 0.25 * minutes)
