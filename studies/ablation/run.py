"""The ablation study: trains every row for every seed, judges all of them, writes one JSON file.

python studies/ablation/run.py --quick --rows full         one row in minutes on a CPU, one seed
python studies/ablation/run.py --rows full,shared --seeds 3
python studies/ablation/run.py --jobs 2                    every row, two runs at a time

Run it again to go on where it stopped: finished runs, images and figures are kept.
study_tables.py prints the tables, plots.py draws the curves.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer
from one_run import run
from rendered import draw_scenes
from rows import EXTERNAL, FITS, ROWS, TABLES, Row

from twostep.data.cache.build import open_cache
from twostep.distill.monitor import read_metrics
from twostep.evaluation.entries import list_entries
from twostep.evaluation.evaluate import EvaluationRequest, evaluate
from twostep.evaluation.prompts import PromptSet
from twostep.recipe.schema import Recipe
from twostep.runtime.files import write_json

HERE = Path(__file__).parent
BASE = HERE / "recipe.yaml"
# What --quick changes: enough to see that a row runs, too little to rank rows.
QUICK = (
    "data.prompt_count=256", "training.turns=12", "training.critic_warmup_turns=4",
    "training.validate_every=4", "training.compile=false",
)  # fmt: skip
# Turns that fit a score to the teacher's images, once for all rows that trust it.
FIT_TURNS, QUICK_FIT_TURNS = 400, 20
FIT = ("training.batch_size=16", "training.turns=1", "training.critic_warmup_turns=0")
# The row whose best, with the same seed, is the quality that "turns to reach" asks for.
MARK = "dmd"


def recipe_of(
    row: Row, name: str, *, seed: int, out: Path, common: Sequence[str], external: Path
) -> Recipe:
    """One run's recipe; later overrides win."""
    turns = max(1, round(Recipe.load(BASE, common).training.turns * row.turns))
    score = [f"score.model={out}/runs/{row.score}/score"] if row.score else []
    return Recipe.load(BASE, [
        *common, *score, *(c.replace(EXTERNAL, str(external)) for c in row.changes),
        f"training.turns={turns}", f"losses.warmup_turns={turns if row.regression else 0}",
        f"training.validate_every={max(1, turns // 4)}", f"training.seed={seed}",
        *_places(f"{name}-{seed}", out),
    ])  # fmt: skip


def recipe_of_fit(name: str, turns: int, *, out: Path, common: Sequence[str]) -> Recipe:
    """The run that fits the score `name` for all rows that trust it."""
    changes = (*common, *FIT, *FITS[name], f"score.fit_turns={turns}", *_places(name, out))
    return Recipe.load(BASE, changes)


def _places(name: str, out: Path) -> tuple[str, ...]:
    return f"name={name}", f"output={out}/runs", f"data.cache={out}/cache"


def train_all(recipes: Sequence[Recipe], jobs: int) -> None:
    """Every recipe, `jobs` at a time, in processes that serve one run after the other."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for finished in as_completed([pool.submit(run, recipe, threads) for recipe in recipes]):
            print(finished.result(), flush=True)


def validated(folder: Path) -> list[dict[str, float]]:
    """What the run's validation saw: `turn`, `distance` and `step1_distance`."""
    return [
        {
            "turn": record["turn"],
            "distance": record["validation/kernel_distance"],
            "step1_distance": record["validation/step1_distance"],
        }
        for record in read_metrics(folder)
        if "validation/kernel_distance" in record
    ]


def turns_to_reach(curve: Sequence[dict[str, float]], quality: float) -> int | None:
    """The first validated turn from which the distance stays at `quality` or below."""
    reached = None
    for point in curve:
        if point["distance"] > quality:
            reached = None
        elif reached is None:
            reached = int(point["turn"])
    return reached


def main(
    rows: Annotated[str, typer.Option(help="names from rows.py, with commas; all if empty")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option()] = Path("runs/ablation"),
    images: Annotated[int, typer.Option(min=64)] = 512,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    quick: Annotated[bool, typer.Option("--quick")] = False,
    judge: Annotated[bool, typer.Option("--judge", help="train nothing, judge what is")] = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="recipe overrides for every row")
    ] = None,
) -> None:
    """Trains, judges, and writes OUT/results.json."""
    names = [name for name in rows.split(",") if name] or list(ROWS)
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        raise typer.BadParameter(f"unknown rows {unknown}; there are: {', '.join(ROWS)}")
    common = (*(QUICK if quick else ()), *(overrides or ()))
    external = out / "rendered"
    # Seed by seed, so that a study that is cut short has every row at least once.
    recipes = {
        (name, seed): recipe_of(
            ROWS[name], name, seed=seed, out=out, common=common, external=external
        )
        for seed in range(1 if quick else seeds)
        for name in names
    }
    fit_turns = QUICK_FIT_TURNS if quick else FIT_TURNS
    first = next(iter(recipes.values()))
    if not judge:
        if any(EXTERNAL in change for name in names for change in ROWS[name].changes):
            draw_scenes(external, Recipe.load(BASE, common))
        open_cache(first)
        trusted = {ROWS[name].score for name in names}
        fits = [recipe_of_fit(f, fit_turns, out=out, common=common) for f in FITS if f in trusted]
        train_all(fits, 1)
        train_all(list(recipes.values()), jobs)
    done = {k: r for k, r in recipes.items() if (r.run_folder / "done.json").exists()}
    if not done:
        raise typer.BadParameter(f"--judge: no run in {out} is finished")

    students = {r.name: str(r.run_folder / "student") for r in done.values()}
    request = EvaluationRequest(
        entries=list_entries(first.teacher.model, first.teacher.steps, students),
        prompts=PromptSet.load("emoji", images),
        size=(first.data.height, first.data.width),
        halves=0,
        timed=0,
    )
    comparison = evaluate(request, out / "images")
    if comparison is None:  # another process judges
        return
    found = comparison.figures
    runs: dict[str, list[dict[str, Any]]] = {}
    for (name, seed), recipe in done.items():
        runs.setdefault(name, []).append({"seed": seed, **_of_run(recipe, found)})
    results = {
        **{k: v for k, v in found.items() if k not in ("models", "gap_closed")},
        "command": " ".join(
            ["python", "studies/ablation/run.py", *(a for a in sys.argv[1:] if a != "--judge")]
        ),
        "turns": Recipe.load(BASE, common).training.turns,
        "batch_size": first.training.batch_size,
        "fit_turns": fit_turns,
        "baselines": {k: _figures(found["models"][k]) for k in ("teacher_8", "naive_2")},
        "mark": MARK if MARK in runs else None,
        "tables": TABLES,
        "papers": {name: row.paper for name, row in ROWS.items() if row.paper},
        "rows": _with_turns_to_reach(runs),
    }
    path = out / "results.json"
    write_json(path, results)
    comparison.write(out / "metrics.json", {"command": results["command"]})
    print(path)


def _figures(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "frechet_to_teacher": model["frechet_to_teacher"],
        "accuracy": model["accuracy"],
        "diversity": model["diversity"],
        "paired_distance": model["paired_distance"],
    }


def _of_run(recipe: Recipe, found: dict[str, Any]) -> dict[str, Any]:
    key = f"{recipe.name}_2"
    model = found["models"][key]
    curve = validated(recipe.run_folder)
    return {
        **_figures(model),
        "gap_closed": found["gap_closed"].get(key),
        "validation_distance": min(point["distance"] for point in curve),
        "preview_accuracy": model["preview"]["accuracy"]["overall"],
        "preview_frechet": model["preview"]["frechet_to_teacher"],
        "curve": curve,
        **json.loads((recipe.run_folder / "done.json").read_text()),
    }


def _with_turns_to_reach(
    runs: dict[str, list[dict[str, Any]]],
) -> dict[str, list[dict[str, Any]]]:
    if MARK not in runs:
        return runs
    # Seed by seed: each validates on prompts of its own.
    marks = {run["seed"]: run["validation_distance"] for run in runs[MARK]}
    return {
        name: [
            run | {"turns_to_reach": turns_to_reach(run["curve"], marks.get(run["seed"], 0.0))}
            for run in of_row
        ]
        for name, of_row in runs.items()
    }


if __name__ == "__main__":
    typer.run(main)
