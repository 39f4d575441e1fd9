"""The study's second judge of emoji scenes: another architecture than the inspector's.

It counts every kind of object over the whole picture, where the inspector looks for peaks of a map,
and was trained on renderings of its own (`train_second_judge.py`). No training, tuning or choice
of a student uses it, so that no student can have learnt to please it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, log_softmax, logsigmoid, softplus

from twostep.emoji.inspector import Verdict
from twostep.emoji.scenes import BACKGROUND_NAMES, OBJECTS, Scene
from twostep.runtime.files import write_atomically

WEIGHTS = Path(__file__).parent / "second_judge.safetensors"
COUNTS = 4  # none to three
GRID = 16
_POOLED = 8
# The gap between two objects at which a relation is as likely as not, and how sharply it turns, of
# the canvas. The inspector's margin, too.
_MARGIN, _SHARPNESS = 0.1, 0.05
# One answer cannot cost more than this, or a single picture would decide a mean.
FLOOR = -7.0


@dataclass(frozen=True)
class Opinion:
    """Attributes:
    counts: (B, objects, COUNTS), log-probabilities.
    centres: (B, objects, 2), x and y in 0..1; of use where there is one of a kind.
    backgrounds: (B, backgrounds), log-probabilities.
    """

    counts: Tensor
    centres: Tensor
    backgrounds: Tensor


class _Block(nn.Module):
    """A depthwise kernel, then a mixer of channels (as ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(gelu(self.up(mixed))).permute(0, 3, 1, 2)


class SecondJudge(nn.Module):
    """Counts, centres and background of images (B, 3, 64, 64) in -1..1."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        kinds = len(OBJECTS)
        self.stem = nn.Conv2d(3, width // 2, 4, stride=2, padding=1)
        self.down = nn.Conv2d(width // 2, width, 2, stride=2)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(5)))
        self.density = nn.Conv2d(width, kinds, 1)
        self.density.bias = nn.Parameter(torch.full((kinds,), -4.0))  # objects are rare
        self.attention = nn.Conv2d(width, kinds, 1)
        self.pooled = nn.Linear(width, _POOLED)
        self.count = nn.Sequential(
            nn.Linear(2 + _POOLED, 48), nn.GELU(), nn.Linear(48, COUNTS)
        )  # fmt: skip
        self.kind_bias = nn.Parameter(torch.zeros(kinds, COUNTS))
        self.background = nn.Linear(width, len(BACKGROUND_NAMES))

    def forward(self, images: Tensor) -> Opinion:
        seen = self.blocks(self.down(gelu(self.stem(images))))
        density = softplus(self.density(seen)).flatten(2)
        attention = self.attention(seen).flatten(2).softmax(2)
        pooled = self.pooled(torch.einsum("bkn,bdn->bkd", attention, seen.flatten(2)))
        told = [density.sum(2, keepdim=True), density.amax(2, keepdim=True), pooled]
        counts = self.count(torch.cat(told, 2)) + self.kind_bias
        places = (torch.arange(GRID, device=images.device) + 0.5) / GRID
        y, x = torch.meshgrid(places, places, indexing="ij")
        centres = attention @ torch.stack([x.flatten(), y.flatten()], 1).to(attention)
        background = self.background(seen.mean((2, 3)))
        return Opinion(
            log_softmax(counts.float(), 2), centres.float(), log_softmax(background.float(), 1)
        )

    @torch.no_grad()
    def opinion(self, images: Tensor, batch_size: int = 128) -> Opinion:
        """Of any number of images."""
        parts = [self(part) for part in images.split(batch_size)]
        return Opinion(
            *(torch.cat(x) for x in zip(*(vars(p).values() for p in parts), strict=True))
        )

    def save(self, path: Path = WEIGHTS) -> None:
        weights = {k: v.to(torch.bfloat16).contiguous() for k, v in self.state_dict().items()}
        write_atomically(path, lambda temporary: save_file(weights, temporary))

    @staticmethod
    def load(path: Path = WEIGHTS) -> SecondJudge:
        """In evaluation mode, fp32."""
        model = SecondJudge()
        model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        return model.eval()


def log_likelihood(opinion: Opinion, scenes: Sequence[Scene]) -> Tensor:
    """(B,), natural logarithm of how likely each picture shows what its scene asks for.

    The sum over every kind's count, the background and, where one is asked for, the relation; each
    at least -7.
    """
    asked = torch.zeros(len(scenes), len(OBJECTS), dtype=torch.int64)
    for row, scene in enumerate(scenes):
        for kind, count in Counter(scene.objects).items():
            asked[row, kind] = count
    counts = opinion.counts.gather(2, asked[..., None])[..., 0].clamp_min(FLOOR).sum(1)
    backgrounds = torch.tensor([scene.background for scene in scenes])
    background = opinion.backgrounds.gather(1, backgrounds[:, None])[:, 0].clamp_min(FLOOR)
    relation = torch.zeros(len(scenes))
    for row, scene in enumerate(scenes):
        if scene.relation is not None:
            relation[row] = relation_likelihood(scene, opinion.centres[row]).clamp_min(FLOOR)
    return counts + background + relation


def relation_likelihood(scene: Scene, centres: Mapping[int, Tensor] | Tensor) -> Tensor:
    """Logarithm of how likely the named relation holds, as `relation_gap` is given centres."""
    return logsigmoid((relation_gap(scene, centres) - _MARGIN) / _SHARPNESS)


def relation_gap(scene: Scene, centres: Mapping[int, Tensor] | Tensor) -> Tensor:
    """How far the first object is along the named relation, of the canvas.

    Args:
        centres: by kind of object, (2,) each.
    """
    first, second = (centres[kind] for kind in scene.objects)
    dx, dy = first - second
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[str(scene.relation)]


def verdicts(opinion: Opinion, scenes: Sequence[Scene]) -> list[Verdict]:
    """Yes or no, part by part, as the inspector's."""
    counts, backgrounds = opinion.counts.argmax(2).tolist(), opinion.backgrounds.argmax(1).tolist()
    found = []
    for row, scene in enumerate(scenes):
        asked = Counter(scene.objects)
        relation = scene.relation is None or bool(
            relation_gap(scene, opinion.centres[row]) > _MARGIN
        )
        found.append(
            Verdict(
                objects={k for k, n in enumerate(counts[row]) if n} == set(asked),
                count=all(n == asked.get(k, 0) for k, n in enumerate(counts[row])),
                relation=relation,
                background=backgrounds[row] == scene.background,
            )
        )
    return found
