"""The ablation study: trains every row for every seed, judges all of them, writes one JSON file.

python studies/ablation/run.py --quick                     minutes on a CPU: few turns, one seed
python studies/ablation/run.py --rows full,cut --seeds 3   some rows
python studies/ablation/run.py --jobs 2                    two runs at a time

Run it again to go on where it stopped: finished runs, images and figures are kept. The table in
docs/results.md is written from the result by docs/tables.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rendered import draw_scenes
from rows import EXTERNAL, ROWS, Row

from twostep.config import Recipe
from twostep.evaluation.evaluate import Settings, contenders, evaluate
from twostep.evaluation.prompt_set import PromptSet
from twostep.files import write_atomically
from twostep.teach import teach
from twostep.training.monitor import read_metrics

HERE = Path(__file__).parent
BASE = HERE / "recipe.yaml"
# What --quick changes: enough to see that a row runs, too little to rank rows.
QUICK = (
    "data.prompt_count=256", "losses.warmup_turns=20", "training.turns=40",
    "training.validate_every=10", "training.batch_size=8",
)  # fmt: skip
# Kernel distance at which a student counts as arrived, for "turns to reach".
ARRIVED = 0.1


def recipe_of(
    row: Row, name: str, seed: int, out: Path, common: tuple[str, ...], external: Path
) -> Recipe:
    """One run's recipe; later overrides win."""
    changes = [c.replace(EXTERNAL, str(external)) for c in row.changes]
    overrides = [
        *common, *changes,
        f"name={name}-{seed}", f"output={out}/runs", f"data.cache={out}/cache",
        f"training.seed={seed}",
    ]  # fmt: skip
    if row.only_warmup:
        overrides.append(f"losses.warmup_turns={Recipe.load(BASE, common).training.turns}")
    return Recipe.load(BASE, overrides)


def train(recipe: Recipe, threads: int) -> None:
    """One run in a process of its own."""
    folder = recipe.run_folder
    if (folder / "done.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    write_atomically(path, lambda p: p.write_text(recipe.to_yaml(), encoding="utf-8"))
    started = time.monotonic()
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        subprocess.run(
            [sys.executable, "-m", "twostep", "distill", str(path)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=log,
            check=True,
        )
    seconds = {"seconds": time.monotonic() - started}
    write_atomically(folder / "done.json", lambda p: p.write_text(json.dumps(seconds)))
    print(f"{folder.name}: {seconds['seconds']:.0f} s", flush=True)


def turns_to_arrive(records: list[dict[str, Any]]) -> int | None:
    """The first validated turn from which the kernel distance stays below `ARRIVED`."""
    arrived = None
    for record in records:
        distance = record.get("validation/kernel_distance")
        if distance is None:
            continue
        if distance >= ARRIVED:
            arrived = None
        elif arrived is None:
            arrived = int(record["turn"])
    return arrived


def main(
    rows: Annotated[str, typer.Option(help="names from rows.py, with commas; all if empty")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option()] = Path("runs/ablation"),
    images: Annotated[int, typer.Option(min=64)] = 512,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    quick: Annotated[bool, typer.Option("--quick")] = False,
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
    seeds = 1 if quick else seeds
    external = out / "rendered"
    if any(EXTERNAL in change for name in names for change in ROWS[name].changes):
        draw_scenes(external, Recipe.load(BASE, common))
    recipes = {
        (name, seed): recipe_of(ROWS[name], name, seed, out, common, external)
        for name in names
        for seed in range(seeds)
    }
    teach(next(iter(recipes.values())))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda recipe: train(recipe, threads), recipes.values()))

    first = next(iter(recipes.values()))
    students = {r.name: str(r.run_folder / "student") for r in recipes.values()}
    models = contenders(first.teacher.model, first.teacher.steps, students)
    size = (first.data.height, first.data.width)
    settings = Settings(size=size, halves=0, timed=0)
    comparison = evaluate(models, PromptSet.load("emoji", images), out / "images", settings)
    if comparison is None:  # another process judges
        return
    found = comparison.figures
    results = {
        **{k: v for k, v in found.items() if k not in ("models", "gap_closed")},
        "command": " ".join(["python", "studies/ablation/run.py", *sys.argv[1:]]),
        "turns": first.training.turns,
        "baselines": {k: found["models"][k] for k in ("teacher_8", "naive_2")},
        "rows": {
            name: {
                "label": ROWS[name].label,
                "group": ROWS[name].group,
                "paper": ROWS[name].paper,
                "seeds": [_of_run(recipes[name, seed], found) for seed in range(seeds)],
            }
            for name in names
        },
    }
    path = out / "results.json"
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
    comparison.write(out / "metrics.json", {"command": results["command"]})
    print(path)


def _of_run(recipe: Recipe, found: dict[str, Any]) -> dict[str, Any]:
    key = f"{recipe.name}_2"
    model = found["models"][key]
    records = read_metrics(recipe.run_folder)
    return {
        "frechet_to_teacher": model["frechet_to_teacher"],
        "gap_closed": found["gap_closed"].get(key),
        "accuracy": model["accuracy"]["overall"],
        "diversity": model["diversity"],
        "preview_accuracy": model["preview"]["accuracy"]["overall"],
        "preview_frechet": model["preview"]["frechet_to_teacher"],
        "turns_to_arrive": turns_to_arrive(records),
        "seconds": json.loads((recipe.run_folder / "done.json").read_text())["seconds"],
    }


if __name__ == "__main__":
    typer.run(main)
