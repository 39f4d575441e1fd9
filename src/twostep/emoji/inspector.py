"""The inspector: reads which objects an emoji scene shows, how many, where, on which background.

Judges a picture against its prompt in the manner of GenEval (arXiv 2310.11513) and gives the
features of the Fréchet distance.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twostep.emoji.scenes import BACKGROUND_NAMES, CATEGORIES, OBJECTS, Scene

GRID = 16
FEATURES = 96
_THRESHOLD = 0.4
# Centres must be this far apart along the named axis, as a fraction of the canvas.
_RELATION_MARGIN = 0.1


@dataclass(frozen=True)
class Reading:
    """The inspector's raw output.

    Attributes:
        heatmap_logits: (B, objects, GRID, GRID).
        background_logits: (B, backgrounds).
        features: (B, FEATURES), pooled, for distances between sets of images.
    """

    heatmap_logits: Tensor
    background_logits: Tensor
    features: Tensor


@dataclass(frozen=True)
class Found:
    """What a picture shows: (object index, x, y) with x, y in 0..1, and the background's index."""

    objects: tuple[tuple[int, float, float], ...]
    background: int


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what its prompt asks for."""

    objects: bool
    count: bool
    relation: bool
    background: bool

    @property
    def all(self) -> bool:
        return self.objects and self.count and self.relation and self.background


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(nn.functional.silu(self.conv1(nn.functional.silu(self.norm(x)))))


class Inspector(nn.Module):
    """A small convolutional detector for images in -1..1, 64x64."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(3, width // 2, 4, stride=2, padding=1)
        self.down = nn.Conv2d(width // 2, width, 4, stride=2, padding=1)
        self.fine = nn.Sequential(_Block(width), _Block(width))
        self.coarse_down = nn.Conv2d(width, FEATURES, 4, stride=2, padding=1)
        self.coarse = nn.Sequential(_Block(FEATURES), _Block(FEATURES))
        self.lateral = nn.Conv2d(FEATURES, width, 1)
        self.merge = _Block(width)
        self.heatmap = nn.Conv2d(width, len(OBJECTS), 1)
        self.heatmap.bias = nn.Parameter(torch.full((len(OBJECTS),), -4.0))  # objects are rare
        self.background = nn.Linear(FEATURES, len(BACKGROUND_NAMES))

    def forward(self, images: Tensor) -> Reading:
        """images: (B, 3, 64, 64) in -1..1."""
        fine = self.fine(self.down(nn.functional.silu(self.stem(images))))
        coarse = self.coarse(self.coarse_down(fine))
        up = nn.functional.interpolate(self.lateral(coarse), scale_factor=2.0)
        features = coarse.mean((2, 3))
        return Reading(self.heatmap(self.merge(fine + up)), self.background(features), features)

    @torch.no_grad()
    def detect(self, images: Tensor, batch_size: int = 128) -> list[Found]:
        """What each image shows. images: (B, 3, 64, 64) in -1..1."""
        found: list[Found] = []
        for part in images.split(batch_size):
            reading = self(part)
            found.extend(_decode(reading))
        return found

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 128) -> Tensor:
        """Features for a Fréchet distance, fp64 (B, FEATURES)."""
        return torch.cat([self(part).features.double() for part in images.split(batch_size)])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "inspector.tmp"
        weights = {k: v.to(torch.bfloat16).contiguous() for k, v in self.state_dict().items()}
        save_file(weights, temporary)
        os.replace(temporary, folder / "inspector.safetensors")
        (folder / "config.json").write_text(json.dumps({"width": self.width}))

    @staticmethod
    def load(folder: Path) -> Inspector:
        """From a folder written by `save`; in evaluation mode, fp32."""
        config = json.loads((folder / "config.json").read_text())
        model = Inspector(**config)
        weights = load_file(folder / "inspector.safetensors")
        model.load_state_dict({k: v.float() for k, v in weights.items()})
        return model.eval()


def _decode(reading: Reading) -> list[Found]:
    """Local maxima of the heatmap, suppressed across objects within two cells."""
    scores = torch.sigmoid(reading.heatmap_logits.float())
    best, kinds = scores.max(1)
    is_peak = best == nn.functional.max_pool2d(best[:, None], 5, stride=1, padding=2)[:, 0]
    hits = is_peak & (best > _THRESHOLD)
    backgrounds = reading.background_logits.argmax(1).tolist()
    found = []
    for hit, kind, background in zip(hits, kinds, backgrounds, strict=True):
        rows, columns = torch.nonzero(hit, as_tuple=True)
        objects = tuple(
            (int(kind[r, c]), (c.item() + 0.5) / GRID, (r.item() + 0.5) / GRID)
            for r, c in zip(rows, columns, strict=True)
        )
        found.append(Found(objects, background))
    return found


def is_right(scene: Scene, found: Found) -> Verdict:
    """Judges `found` against what `scene` asks for.

    Objects: every kind asked for is there and no other. Count: as many of each kind as asked.
    Relation: holds between the two objects, along its axis, by a tenth of the canvas.
    """
    asked, seen = Counter(scene.objects), Counter(kind for kind, _, _ in found.objects)
    relation = True
    if scene.relation is not None:
        places = {kind: (x, y) for kind, x, y in found.objects}
        first, second = (places.get(i) for i in scene.objects)
        relation = first is not None and second is not None
        if first is not None and second is not None:
            dx, dy = first[0] - second[0], first[1] - second[1]
            gap = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[scene.relation]
            relation = gap > _RELATION_MARGIN
    return Verdict(
        objects=set(asked) == set(seen),
        count=asked == seen,
        relation=relation,
        background=found.background == scene.background,
    )


def score(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Accuracies in 0..1.

    `overall`: everything the prompt asks for is right. `single`, `two`, `counting`, `position`:
    objects, count and relation right, over the prompts of that category. `background`: over all.
    """
    result = {"overall": _mean([v.all for v in verdicts])}
    for category in CATEGORIES:
        result[category] = _mean(
            [
                v.objects and v.count and v.relation
                for s, v in zip(scenes, verdicts, strict=True)
                if s.category == category
            ]
        )
    result["background"] = _mean([v.background for v in verdicts])
    return result


def _mean(flags: list[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")
