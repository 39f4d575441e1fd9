"""Compares students with their teacher on the same prompts and noise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from twostep.evaluation.features import Extractor, load_extractor
from twostep.evaluation.figures import Evidence, Trial, figures, intervals, nested
from twostep.evaluation.image_store import Contender, ImageSet, ImageStore, make_images
from twostep.evaluation.latency import measure_latency
from twostep.evaluation.prompts import PromptSet
from twostep.evaluation.report.page import Pair, verdict, write_report
from twostep.evaluation.scorers import load_scorer
from twostep.inference.sampler import Sampler
from twostep.models.folder import ModelFolder
from twostep.runtime.files import write_atomically
from twostep.runtime.processes import rank_and_world, wait_for
from twostep.runtime.provenance import git_commit, machine

# How many columns the report's pictures have, and how many pairs it shows of each kind.
_SHOWN, _PAIRS = 12, 8
_TIMED_IMAGES = 32
_REFERENCE = "reference"
_PREVIEW = "/preview"


@dataclass(frozen=True)
class Settings:
    """What is measured and how finely.

    Attributes:
        features: extractors' names; the first gives the main figures.
        scores: scorers' names.
        halves: random halves of the prompts behind each interval; 0 for no intervals.
        size: (height, width) in pixels.
        timed: images in the batch that is timed; 0 for no timing.
    """

    features: Sequence[str] = ("inspector",)
    scores: Sequence[str] = ("inspector",)
    halves: int = 100
    size: tuple[int, int] = (64, 64)
    timed: int = _TIMED_IMAGES


def contenders(
    teacher: str, teacher_steps: int, students: Mapping[str, str], student_steps: int | None = None
) -> list[Contender]:
    """The teacher, its weights at two steps, and the students.

    Args:
        students: models by name. A two-step student folder always runs in 2 steps.
        student_steps: for students that are ordinary folders; 8 if None.
    """
    result = [Contender(f"teacher_{teacher_steps}", teacher, teacher_steps)]
    if teacher_steps != 2:
        result.append(Contender("naive_2", teacher, 2))
    for name, model in students.items():
        two_step = ModelFolder.open(model).student is not None
        steps = None if two_step else student_steps or 8
        result.append(Contender(f"{name}_{steps or 2}", model, steps))
    return result


@dataclass(frozen=True)
class Comparison:
    """What an evaluation found.

    Attributes:
        figures: as in `metrics.json`.
        panels: the first pictures of each row, (K, 3, H, W), by label.
        captions: K prompts.
        pairs: a student's images beside the teacher's of the same noise.
    """

    figures: dict[str, Any]
    panels: dict[str, Tensor]
    captions: list[str]
    pairs: list[Pair]

    @property
    def verdict(self) -> str:
        """What the figures come to, in a sentence per student."""
        return verdict(self.figures)

    def write(
        self,
        path: Path,
        facts: Mapping[str, Any],
        curves: Sequence[dict[str, Any]] = (),
        title: str = "Two steps against their teacher",
    ) -> None:
        """Writes the figures to `path` and the report to `report.html` beside it.

        Args:
            facts: `command` and the like, put among the figures.
            curves: the training's records, for the report.
        """
        report = {**self.figures, **facts}
        text = json.dumps(report, indent=2, ensure_ascii=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
        write_report(
            path.parent, report, self.panels, self.captions, list(curves), title, self.pairs
        )


def evaluate(
    models: Sequence[Contender],
    prompts: PromptSet,
    folder: Path,
    settings: Settings,
    device: torch.device | str = "cpu",
) -> Comparison | None:
    """Makes every model's images and judges them.

    Under torchrun every process makes its share of the images; the first one judges, the others
    return None.

    The distances are to a second set of the teacher's images, from other noise: the teacher's own
    distance to it is the floor, and a perfect student scores that.

    Args:
        models: the first is the teacher; `naive_2` among them gives the gap that students close.
        folder: for the images; a run that finds them goes on from there.

    Raises:
        ExtractorError, ScorerError, ModelError: before any image is made.
    """
    extractors = [load_extractor(name) for name in settings.features]
    scorers = [load_scorer(name) for name in settings.scores]
    rank, world = rank_and_world()
    teacher = models[0]
    everyone = [*models, replace(teacher, key=_REFERENCE, reference=True)]
    stores = [ImageStore(folder / c.key, c, prompts, settings.size) for c in everyone]
    _make_all(stores, device, rank, world)
    if rank:
        return None
    wait_for(lambda: not any(s.missing() for s in stores), "the other processes")

    console = Console(stderr=True)
    console.print("judging", highlight=False)
    pictures = _with_previews({store.contender.key: store.read() for store in stores})
    scores = {
        key: {name: v for score in scorers for name, v in score(images, prompts).items()}
        for key, images in pictures.items()
        if key != _REFERENCE
    }
    trials = {e.name: _trial(e, pictures, scores, prompts, models) for e in extractors}
    main, *others = trials
    result = _assemble(trials[main], settings.halves)
    for name in others:
        for key, more in _assemble(trials[name], settings.halves).items():
            result[key].setdefault("features", {})[name] = more
    if settings.timed:
        console.print("timing", highlight=False)
        for key, measured in _time(models, prompts, settings, device).items():
            result[key] |= measured
    found = {
        "models": _previews_inside(result),
        "floor": result[teacher.key]["frechet_to_teacher"],
        "gap_closed": {
            k: v["gap_closed"]
            for k, v in result.items()
            if "gap_closed" in v and not k.endswith(_PREVIEW)
        },
        "prompts": len(prompts.prompts),
        "images": len(prompts),
        "extractor": main,
        "halves": settings.halves,
        "commit": git_commit(),
        "machine": machine(),
        "date": date.today().isoformat(),
    }
    shown = min(_SHOWN, len(prompts.prompts))
    panels = {_label(key): images[:shown] for key, images in pictures.items() if key != _REFERENCE}
    pairs = _pairs(trials[main], pictures, models, prompts)
    return Comparison(found, panels, prompts.captions[:shown], pairs)


def _make_all(
    stores: Sequence[ImageStore], device: torch.device | str, rank: int, world: int
) -> None:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    loaded: dict[str, Sampler] = {}

    def load(model: str) -> Sampler:
        if model not in loaded:
            loaded.clear()  # one model in memory at a time
            loaded[model] = Sampler.load(model, device)
        return loaded[model]

    mine = [part for store in stores for part in store.parts[rank::world]]
    total = sum(part.stop - part.start for part in mine)
    with Progress(*columns, console=Console(stderr=True), disable=rank > 0) as bars:
        bar = bars.add_task("images", total=total)
        # Stores of one model in a row, so that it is loaded once.
        for store in sorted(stores, key=lambda s: s.contender.model):
            bars.update(bar, description=f"images of {store.contender.key}")
            make_images(
                store,
                partial(load, store.contender.model),
                rank,
                world,
                partial(bars.advance, bar),
            )


def _with_previews(sets: Mapping[str, ImageSet]) -> dict[str, Tensor]:
    """Every row of pictures by key; a student's preview, `KEY/preview`, before its result."""
    rows: dict[str, Tensor] = {}
    for key, found in sets.items():
        if found.previews is not None:
            rows[key + _PREVIEW] = found.previews
        rows[key] = found.images
    return rows


def _trial(
    extractor: Extractor,
    pictures: Mapping[str, Tensor],
    scores: Mapping[str, Mapping[str, Tensor]],
    prompts: PromptSet,
    models: Sequence[Contender],
) -> Trial:
    seen = {
        key: Evidence(extractor(images), scores.get(key, {})) for key, images in pictures.items()
    }
    reference = seen.pop(_REFERENCE)
    keys = [c.key for c in models]
    return Trial(
        prompts.groups,
        reference,
        seen[keys[0]],
        seen,
        floor=keys[0],
        naive="naive_2" if "naive_2" in keys else None,
    )


def _assemble(trial: Trial, halves: int) -> dict[str, dict[str, Any]]:
    around = intervals(trial, halves)
    result = {}
    for key, flat in figures(trial).items():
        result[key] = nested(flat)
        if around.get(key):
            result[key]["interval"] = nested(around[key])
    return result


def _previews_inside(result: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`KEY/preview` as `KEY`'s entry `preview`."""
    models = {key: dict(value) for key, value in result.items() if not key.endswith(_PREVIEW)}
    for key in models:
        if key + _PREVIEW in result:
            models[key]["preview"] = result[key + _PREVIEW]
    return models


def _time(
    models: Sequence[Contender],
    prompts: PromptSet,
    settings: Settings,
    device: torch.device | str,
) -> dict[str, dict[str, Any]]:
    count = min(settings.timed, len(prompts))
    result = {}
    for model in models:
        sampler = Sampler.load(model.model, device)
        noise = prompts.noise(slice(0, count), sampler.noise_shape(*settings.size))
        latency = measure_latency(sampler, prompts.captions[:count], noise, model.steps)
        result[model.key] = {"seconds_per_image": latency.total, "latency": latency.as_dict()}
    return result


def _label(key: str) -> str:
    name, preview, _ = key.partition(_PREVIEW)
    name, _, steps = name.rpartition("_")
    if preview:
        return f"{name}, step-1 preview"
    return f"{'same weights' if name == 'naive' else name}, {steps} steps"


def _pairs(
    trial: Trial,
    pictures: Mapping[str, Tensor],
    models: Sequence[Contender],
    prompts: PromptSet,
) -> list[Pair]:
    """The first student's images furthest from and closest to the teacher's of the same noise."""
    students = [c.key for c in models if not c.key.startswith(("teacher_", "naive_"))]
    if not students:
        return []
    key = students[0]
    apart = (trial.sets[key].features - trial.teacher.features).norm(dim=1)
    order = apart.argsort(descending=True).tolist()
    count = min(_PAIRS, len(order) // 2)
    return [
        Pair(
            kind,
            prompts.captions[row],
            pictures[models[0].key][row],
            pictures[key][row],
        )
        for kind, rows in (("furthest apart", order[:count]), ("closest", order[-count:][::-1]))
        for row in rows
    ]
