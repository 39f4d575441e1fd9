"""Compares a teacher, its weights at two steps, and students, on held-out emoji prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twostep.backbones.model import ZOO
from twostep.emoji.inspector import FEATURES, Inspector, is_right, score
from twostep.emoji.scenes import Scene, held_out_scenes
from twostep.metrics import frechet_distance, gap_closed, pairwise_diversity
from twostep.rollout import seeded_noise
from twostep.sampler import Sampler

EXTRACTOR = f"inspector-{FEATURES}"
# How many columns the report's pictures have.
SHOWN = 12
_TIMED_IMAGES, _TIMED_RUNS = 32, 3


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts, two seeds each, with noise for two disjoint sets.

    Attributes:
        scenes, captions: one per image; English and Chinese in turn.
        groups: (images,) which images share a prompt.
        noise: what every model is given.
        other_noise: for the teacher's second set, which is the reference.
    """

    scenes: list[Scene]
    captions: list[str]
    groups: Tensor
    noise: Tensor
    other_noise: Tensor

    @staticmethod
    def held_out(images: int, shape: tuple[int, int, int], seed: int = 0) -> Prompts:
        """`images` images, rounded down to an even number, of `images / 2` prompts."""
        count = images // 2
        scenes = held_out_scenes(count, seed)
        # Categories come in turn of four: the language changes every four.
        captions = [s.caption("zh" if i // 4 % 2 else "en") for i, s in enumerate(scenes)]
        seeds = np.random.SeedSequence((seed, 6)).generate_state(4 * count, np.uint32).tolist()
        return Prompts(
            scenes * 2,
            captions * 2,
            torch.arange(count).repeat(2),
            seeded_noise(seeds[: 2 * count], shape),
            seeded_noise(seeds[2 * count :], shape),
        )


@dataclass(frozen=True)
class Comparison:
    """Figures, as in `report.json`, and the first pictures of each row, (K, 3, H, W)."""

    figures: dict[str, Any]
    panels: dict[str, Tensor]
    captions: list[str]


@dataclass
class _Judge:
    """Reads images with the inspector and compares them with the reference set."""

    prompts: Prompts
    inspector: Inspector = field(default_factory=lambda: Inspector.load(ZOO / "inspector"))

    def __post_init__(self) -> None:
        self.reference: Tensor | None = None
        self.teacher_diversity = float("nan")

    def read(self, images: Tensor) -> tuple[Tensor, dict[str, float]]:
        verdicts = [
            is_right(scene, found)
            for scene, found in zip(self.prompts.scenes, self.inspector.detect(images), strict=True)
        ]
        return self.inspector.features(images), score(self.prompts.scenes, verdicts)

    def judge(self, images: Tensor) -> dict[str, Any]:
        assert self.reference is not None
        features, accuracy = self.read(images)
        spread = pairwise_diversity(features, self.prompts.groups)
        return {
            "frechet_to_teacher": frechet_distance(features, self.reference),
            "accuracy": accuracy,
            "diversity": spread / self.teacher_diversity,
        }


def seconds_per_image(sampler: Sampler, prompts: Prompts, steps: int | None) -> float:
    """Warm time from prompt to pixels, text encoding included; the best of a few runs."""
    count = min(_TIMED_IMAGES, len(prompts.captions))
    captions, noise = prompts.captions[:count], prompts.noise[:count]
    times = []
    for _ in range(_TIMED_RUNS):
        sampler.encoder.forget()
        started = time.perf_counter()
        sampler.generate(captions, noise, steps)
        times.append(time.perf_counter() - started)
    return min(times) / count


def compare(
    teacher: Sampler,
    students: Mapping[str, Sampler],
    images: int,
    size: tuple[int, int] = (64, 64),
    teacher_steps: int = 8,
    on_stage: Callable[[str], None] | None = None,
) -> Comparison:
    """Judges the teacher, its weights at two steps, and each student, at equal noise.

    The reference is a second set of teacher images from other noise, so that a student which is
    the teacher scores the floor: `gap_closed` = 1 - (d(student) - floor) / (d(naive_2) - floor),
    with d the Fréchet distance to the reference and floor = d(teacher_8).

    Args:
        students: by key, e.g. `student_2`.
        images: images per set, two for each prompt.
    """
    prompts = Prompts.held_out(images, teacher.noise_shape(*size))
    judge = _Judge(prompts)
    say = on_stage or (lambda _: None)
    shown = min(SHOWN, len(prompts.captions) // 2)

    say("teacher, reference set")
    reference = teacher.generate(prompts.captions, prompts.other_noise, teacher_steps)
    judge.reference, _ = judge.read(reference)
    say("teacher")
    made = teacher.generate(prompts.captions, prompts.noise, teacher_steps)
    features, _ = judge.read(made)
    judge.teacher_diversity = pairwise_diversity(features, prompts.groups)
    models: dict[str, Any] = {f"teacher_{teacher_steps}": judge.judge(made)}
    panels = {f"teacher, {teacher_steps} steps": made[:shown]}
    say("same weights, 2 steps")
    made = teacher.generate(prompts.captions, prompts.noise, 2)
    models["naive_2"] = judge.judge(made)
    panels["same weights, 2 steps"] = made[:shown]
    floor = models[f"teacher_{teacher_steps}"]["frechet_to_teacher"]
    naive = models["naive_2"]["frechet_to_teacher"]
    closed = {}
    for key, student in students.items():
        say(key)
        name = key.removesuffix("_2")
        sample = student.sample(prompts.captions, prompts.noise)
        made = student.decoder.decode(sample.latents)
        models[key] = judge.judge(made)
        if sample.preview is not None:
            preview = student.decoder.decode(sample.preview)
            models[key]["preview"] = judge.judge(preview)
            panels[f"{name}, step-1 preview"] = preview[:shown]
        panels[f"{name}, 2 steps"] = made[:shown]
        if naive > floor:  # too few images, or a teacher that needs no distilling: no gap
            closed[key] = gap_closed(models[key]["frechet_to_teacher"], naive, floor)
    say("timing")
    models[f"teacher_{teacher_steps}"]["seconds_per_image"] = seconds_per_image(
        teacher, prompts, teacher_steps
    )
    models["naive_2"]["seconds_per_image"] = seconds_per_image(teacher, prompts, 2)
    for key, student in students.items():
        models[key]["seconds_per_image"] = seconds_per_image(student, prompts, None)
    figures = {
        "models": models,
        "floor": floor,
        "gap_closed": closed,
        "prompts": len(prompts.captions) // 2,
        "images": len(prompts.captions),
        "extractor": EXTRACTOR,
    }
    return Comparison(figures, panels, prompts.captions[:shown])
