"""`twostep evaluate`: arguments checked, models named, everything written."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from twostep.errors import InputError
from twostep.evaluation.evaluate import Settings, contenders, evaluate
from twostep.evaluation.prompts import PromptSet
from twostep.inference.generate import parse_size
from twostep.runtime.devices import pick_device
from twostep.runtime.processes import local_device


def run_evaluation(
    models: Sequence[str],
    reference: str,
    out: Path,
    prompts: str,
    images: int,
    seeds: int,
    seed: int,
    reference_steps: int,
    steps: int | None,
    features: Sequence[str] | None,
    scores: Sequence[str] | None,
    size: str,
    halves: int,
    device: str,
) -> Path | None:
    """Writes `out/metrics.json` and `out/report.html`; the former's path, None on other ranks.

    Raises:
        UserError: for any argument that cannot be used, before images are made.
    """
    is_emoji = prompts == "emoji"
    try:
        prompt_set = PromptSet.load(prompts, images, seeds, seed)
    except ValueError as error:
        raise InputError(str(error)) from error
    settings = Settings(
        features=features or (["inspector"] if is_emoji else ["efficientnet-lite0"]),
        scores=scores if scores is not None else (["inspector"] if is_emoji else []),
        halves=halves,
        size=parse_size(size),
    )
    ranks = contenders(reference, reference_steps, _names(models), steps)
    chosen = local_device(pick_device(device))
    comparison = evaluate(ranks, prompt_set, out / "images", settings, chosen)
    if comparison is None:
        return None
    path = out / "metrics.json"
    command = shlex.join(["twostep", *sys.argv[1:]])
    comparison.write(path, {"command": command})
    Console(stderr=True).print(f"[bold]{comparison.verdict}[/]", highlight=False)
    return path


def _names(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model: `student` for one, its folder's name among several.

    Raises:
        InputError: if two models would have the same name.
    """
    if len(models) == 1:
        return {"student": models[0]}
    names: dict[str, str] = {}
    for model in models:
        path = Path(model.removeprefix("zoo:"))
        # A run's folder says more than the `student` inside it.
        name = path.parent.name if path.name == "student" and path.parent.name else path.name
        if name in names:
            raise InputError(f"model: {model!r} and {names[name]!r} are both called {name!r}")
        names[name] = model
    return names
