"""What two judges and two extractors see in a student's pictures, picture by picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import second_judge
import torch
from low_level import high_frequency_power
from safetensors.torch import load_file, save_file
from second_judge import FLOOR, SecondJudge
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, max_pool2d

from twostep.emoji.inspector import GRID, Inspector, Reading, is_right
from twostep.emoji.scenes import Scene
from twostep.evaluation.features import Extractor, load_extractor
from twostep.evaluation.prompts import PromptSet
from twostep.inference.generate import SamplerOptions
from twostep.inference.sampler import Sampler
from twostep.models.folder import ModelFolder
from twostep.runtime.files import write_atomically
from twostep.zoo import ZOO

EXTRACTORS = ("inspector", "efficientnet-lite0")
SIZE, _BATCH = (64, 64), 64


@dataclass(frozen=True)
class Test:
    """Prompts that are judged: `once` one picture each, `twice` a second one for the spread.

    The tuning's are others than the study's.
    """

    once: PromptSet
    twice: PromptSet

    @staticmethod
    def of(images: int, *, seed: int) -> Test:
        """`images` held-out prompts; a quarter of them twice."""
        once = PromptSet.load("emoji", images, seeds_per_prompt=1, seed=seed)
        twice = PromptSet(
            once.prompts[: images // 4],
            once.scenes and once.scenes[: images // 4],
            2,
            seed=seed + 1,
        )
        return Test(once, twice)


@torch.no_grad()
def judge(
    model: str, test: Test, *, steps: int | None, reference: bool = False
) -> dict[str, Tensor]:
    """Everything about `model`'s pictures: scores (N,) and features (N, D).

    `NAME/log_likelihood`, `NAME/right` for both judges, `preview/...` for a student's previews by
    the second one, `roughness`, `features/NAME`, and `pairs/NAME` of `test.twice`.

    Args:
        reference: from the noise of the reference set.
    """
    sampler = SamplerOptions().load(ModelFolder.open(model), test.once.prompts)
    images, previews = _paint(sampler, test.once, steps, reference)
    scenes = test.once.scenes
    assert scenes is not None
    found = _scores(images, scenes)
    if previews is not None:
        found |= {f"preview/{k}": v for k, v in _scores(previews, scenes, only="second").items()}
    found["roughness"] = high_frequency_power(images)
    again, _ = _paint(sampler, test.twice, steps, reference)
    for name in EXTRACTORS:
        extract = _extractor(name)
        found[f"features/{name}"] = extract(images)
        found[f"pairs/{name}"] = extract(again)
    return {name: value.float().contiguous() for name, value in found.items()}


def judged(path: Path) -> dict[str, Tensor]:
    """What `judge` found, from its file."""
    return load_file(path)


def keep(found: dict[str, Tensor], path: Path) -> None:
    """Writes what `judge` found."""
    write_atomically(path, lambda temporary: save_file(found, temporary))


def _paint(
    sampler: Sampler, prompts: PromptSet, steps: int | None, reference: bool
) -> tuple[Tensor, Tensor | None]:
    images, previews = [], []
    for start in range(0, len(prompts), _BATCH):
        rows = slice(start, min(start + _BATCH, len(prompts)))
        noise = prompts.noise(rows, sampler.noise_shape(*SIZE), reference)
        sample = sampler.sample(prompts.captions[rows], noise, steps)
        images.append(sampler.decoder.decode(sample.latents))
        if sample.preview is not None:
            previews.append(sampler.decoder.decode(sample.preview))
    return torch.cat(images), torch.cat(previews) if previews else None


def _scores(images: Tensor, scenes: Sequence[Scene], only: str = "") -> dict[str, Tensor]:
    opinion = _second().opinion(images)
    right = [v.all for v in second_judge.verdicts(opinion, scenes)]
    likely = second_judge.log_likelihood(opinion, scenes)
    if only:
        return {"log_likelihood": likely, "right": torch.tensor(right).float()}
    inspector = _inspector()
    readings = [inspector(part) for part in images.split(128)]
    seen = [is_right(s, f).all for s, f in zip(scenes, inspector.detect(images), strict=True)]
    return {
        "second/log_likelihood": likely,
        "second/right": torch.tensor(right).float(),
        "inspector/log_likelihood": torch.cat(
            [log_likelihood(r, scenes[128 * i :]) for i, r in enumerate(readings)]
        ),
        "inspector/right": torch.tensor(seen).float(),
    }


def log_likelihood(reading: Reading, scenes: Sequence[Scene]) -> Tensor:
    """(B,), the inspector's reading as a likelihood of what a scene asks for.

    A kind asked for n times: its n highest peaks are there and the next one is not. Background and
    relation as the second judge has them, each part at least -7.
    """
    peaks = _peaks(reading.heatmap_logits.float())
    there, absent = logsigmoid(peaks), logsigmoid(-peaks)
    background = log_softmax(reading.background_logits.float(), 1)
    total = []
    for row, scene in enumerate(scenes[: len(peaks)]):
        asked = Counter(scene.objects)
        parts = [background[row, scene.background]]
        for kind in range(peaks.shape[1]):
            count = asked.get(kind, 0)
            parts.append(there[row, kind, :count].sum() + absent[row, kind, count])
        if scene.relation is not None:
            places = {kind: _place(reading.heatmap_logits[row, kind]) for kind in asked}
            parts.append(second_judge.relation_likelihood(scene, places))
        total.append(torch.stack(parts).clamp_min(FLOOR).sum())
    return torch.stack(total)


def _peaks(logits: Tensor) -> Tensor:
    """(B, kinds, 4): the highest local maxima of each kind's map."""
    hills = max_pool2d(logits, 5, stride=1, padding=2)
    return logits.masked_fill(logits < hills, -20.0).flatten(2).topk(4, dim=2).values


def _place(logits: Tensor) -> Tensor:
    row, column = divmod(int(logits.argmax()), GRID)
    return torch.tensor([(column + 0.5) / GRID, (row + 0.5) / GRID])


@cache
def _second() -> SecondJudge:
    return SecondJudge.load()


@cache
def _inspector() -> Inspector:
    return Inspector.load(ZOO / "inspector")


@cache
def _extractor(name: str) -> Extractor:
    return load_extractor(name)
