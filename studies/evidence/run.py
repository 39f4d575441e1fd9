"""The evidence study: worlds, tuning, runs, judging; every claim with its interval.

python studies/evidence/run.py                                 all of it; hours; resumable
python studies/evidence/run.py --until tuned                   only as far as that
python studies/evidence/run.py --rows full,cut --seeds 2       some rows
python studies/evidence/run.py --quick --out runs/quick        whether it runs, in minutes

Run it again to go on where it stopped. claims.py says what is claimed and by which metric.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, Literal

import judging
import numpy as np
import one_run
import typer
from claims import CLAIMS, PEERS, Claim
from intervals import difference, holm
from judging import Test
from rows import ROWS, TABLES, Row
from worlds import BASE, FITS, TUNING, World

from twostep.evaluation.metrics import frechet_distance, kernel_distance, pairwise_diversity
from twostep.recipe.schema import Recipe
from twostep.runtime.files import write_json
from twostep.runtime.provenance import stamp

Stage = Literal["worlds", "tuned", "trained", "judged"]
STAGES: tuple[Stage, ...] = ("worlds", "tuned", "trained", "judged")
# What --quick changes: enough to see that everything runs, too little to say anything.
QUICK = (
    "data.prompt_count=128", "training.turns=4", "training.critic_warmup_turns=1",
    "training.compile=false", "training.validation_samples=8",
)  # fmt: skip
FIT_TURNS, QUICK_FIT_TURNS = 400, 4
TEST_SEED, TUNING_SEED = 0, 500
# The teacher's own images from other noise: what distances are to, and their floor.
REFERENCE, TEACHER = "reference", "teacher_8"
BASELINES = {REFERENCE: 8, TEACHER: 8, "naive_2": 2}


def parallel(jobs: int, function: Callable[..., str], calls: Sequence[tuple[Any, ...]]) -> None:
    """Every call, `jobs` at a time, in processes that serve one after the other."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for finished in as_completed([pool.submit(function, *call, threads) for call in calls]):
            print(finished.result(), flush=True)


def tune(rows: dict[str, Row], world: World, test: Test, jobs: int) -> dict[str, tuple[str, ...]]:
    """The best of each row's four trials, by the inspector's likelihood on the tuning prompts."""
    names = {(row, i): f"tune-{row}-{i}" for row, r in rows.items() for i in range(len(r.trials))}
    recipes = {
        key: world.recipe(rows[key[0]], name, rows[key[0]].trials[key[1]])
        for key, name in names.items()
    }
    parallel(jobs, one_run.run, [(recipe, test) for recipe in recipes.values()])
    found: dict[str, tuple[str, ...]] = {}
    for name, row in rows.items():
        scores = [_tuning_score(recipes[name, i]) for i in range(len(row.trials))]
        found[name] = row.trials[int(np.argmax(scores))]
        print(f"{name}: {' '.join(f'{s:.3f}' for s in scores)}, {' '.join(found[name])}")
    return found


def _tuning_score(recipe: Recipe) -> float:
    path = recipe.run_folder / "judged.safetensors"
    if not path.exists():  # it diverged
        return -np.inf
    return float(judging.judged(path)["inspector/log_likelihood"].mean())


def main(
    rows: Annotated[str, typer.Option(help="names from rows.py, with commas; all if empty")] = "",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="at most; each row's own if empty")
    ] = None,
    out: Annotated[Path, typer.Option()] = Path("runs/evidence"),
    images: Annotated[int, typer.Option(min=16, help="held-out prompts")] = 1024,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 2,
    until: Annotated[str, typer.Option(help=", ".join(STAGES))] = "judged",
    quick: Annotated[bool, typer.Option("--quick")] = False,
) -> None:
    """Goes on with the study and writes OUT/results.json."""
    names = [name for name in rows.split(",") if name] or list(ROWS)
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        raise typer.BadParameter(f"--rows: {unknown} are unknown; there are: {', '.join(ROWS)}")
    if until not in STAGES:
        raise typer.BadParameter(f"--until: {until!r} is none of {', '.join(STAGES)}")
    chosen = {name: ROWS[name] for name in names}
    common = QUICK if quick else ()
    most = 2 if quick and seeds is None else seeds
    counts = {name: min(row.seeds, most or row.seeds) for name, row in chosen.items()}
    worlds = {seed: World(seed, out, common) for seed in range(max(counts.values()))}
    tuning = World(TUNING, out, common)
    fit_turns = QUICK_FIT_TURNS if quick else FIT_TURNS

    for world in (tuning, *worlds.values()):
        world.make(art=out)
    fits = [(w.fit(name, fit_turns),) for w in (tuning, *worlds.values()) for name in FITS]
    parallel(jobs, one_run.fit, fits)
    if until == "worlds":
        return
    tuned = tune(chosen, tuning, Test.of(max(16, images // 2), seed=TUNING_SEED), jobs)
    if until == "tuned":
        return
    test = Test.of(images, seed=TEST_SEED)
    # Seed by seed, so that a study that is cut short has every row at least once.
    recipes = {
        (name, seed): worlds[seed].recipe(chosen[name], f"{name}-{seed}", tuned[name])
        for seed in worlds
        for name in names
        if seed < counts[name]
    }
    parallel(jobs, one_run.run, [(recipe, test) for recipe in recipes.values()])
    if until == "trained":
        return
    _baselines(out, test)
    results = {
        **collect(recipes, out, test),
        "command": " ".join(["python", "studies/evidence/run.py", *sys.argv[1:]]),
        "turns": Recipe.load(BASE, common).training.turns,
        "batch_size": Recipe.load(BASE, common).training.batch_size,
        "fit_turns": fit_turns,
        "fit_evaluations": json.loads((fits[0][0].run_folder / "done.json").read_text())[
            "evaluations"
        ],
        "tuned": {name: list(changes) for name, changes in tuned.items()},
        "prompts": images,
        "tables": TABLES,
        "papers": {name: row.paper for name, row in ROWS.items() if row.paper},
        "fitted": {name: row.score is not None for name, row in ROWS.items()},
        **stamp(),
    }
    write_json(out / "results.json", results)
    print(out / "results.json")


def _baselines(out: Path, test: Test) -> None:
    """The teacher, twice with other noise, and its weights at two steps."""
    teacher = Recipe.load(BASE).teacher.model
    for name, steps in BASELINES.items():
        path = out / "baselines" / f"{name}-{len(test.once)}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            found = judging.judge(teacher, test, steps=steps, reference=name == REFERENCE)
            judging.keep(found, path)


def collect(recipes: dict[tuple[str, int], Recipe], out: Path, test: Test) -> dict[str, Any]:
    """Figures of every run and baseline, and what the claims come to."""
    baselines = {
        name: judging.judged(out / "baselines" / f"{name}-{len(test.once)}.safetensors")
        for name in BASELINES
    }
    reference, teacher = baselines[REFERENCE], baselines[TEACHER]
    seen: dict[str, dict[int, Any]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for (name, seed), recipe in recipes.items():
        done = json.loads((recipe.run_folder / "done.json").read_text())
        run: dict[str, Any] = {"seed": seed, **done}
        path = recipe.run_folder / "judged.safetensors"
        if path.exists():
            found = judging.judged(path)
            seen.setdefault(name, {})[seed] = found
            run |= figures(found, reference, teacher, test)
        rows.setdefault(name, []).append(run)
    assert test.once.scenes is not None
    groups = np.unique([repr(scene) for scene in test.once.scenes], return_inverse=True)[1]
    peers = [Claim(f"ahead of {name}", "full", name) for name in PEERS]
    return {
        "baselines": {
            k: figures(v, reference, teacher, test) for k, v in baselines.items() if k != REFERENCE
        },
        "rows": rows,
        "claims": _settled(CLAIMS, seen, groups),
        "peers": _settled(peers, seen, groups),
    }


def figures(
    found: dict[str, Any], reference: dict[str, Any], teacher: dict[str, Any], test: Test
) -> dict[str, float]:
    """Means over pictures, distances to the reference, and spread relative to the teacher's."""
    result = {k: float(v.mean()) for k, v in found.items() if v.ndim == 1}
    for name in judging.EXTRACTORS:
        key = f"features/{name}"
        result[f"frechet/{name}"] = frechet_distance(found[key], reference[key])
        result[f"kernel/{name}"] = kernel_distance(found[key], reference[key])
        pairs, own = found[f"pairs/{name}"], teacher[f"pairs/{name}"]
        groups = test.twice.groups
        result[f"diversity/{name}"] = pairwise_diversity(pairs, groups) / pairwise_diversity(
            own, groups
        )
    result["roughness"] -= float(teacher["roughness"].mean())
    return result


def _settled(
    claims: Sequence[Claim], seen: dict[str, dict[int, Any]], groups: np.ndarray
) -> list[dict[str, Any]]:
    """Every claim whose rows have been judged, its p corrected for their number."""
    settled: list[dict[str, Any]] = []
    for claim in claims:
        ours, theirs = seen.get(claim.better, {}), seen.get(claim.worse, {})
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            continue
        better, worse = (
            np.stack([of[seed][claim.metric].numpy() for seed in seeds]).astype(float)
            for of in (ours, theirs)
        )
        settled.append({**vars(claim), **vars(difference(better, worse, groups))})
    for entry, adjusted in zip(settled, holm([e["p"] for e in settled]), strict=True):
        entry["p_holm"] = adjusted
    return settled


if __name__ == "__main__":
    typer.run(main)
