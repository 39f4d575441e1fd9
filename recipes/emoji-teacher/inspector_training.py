"""Stage `inspector`: trains the detector that reads emoji scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from autoencoder import to_pixels
from timed_run import TimedRun, warm_then_linear
from torch import nn

from twostep.emoji.inspector import GRID, Inspector, is_right, score
from twostep.emoji.render import Rendering, load_sprites, render
from twostep.emoji.scenes import OBJECTS, Scene, held_out_scenes, sample_training_scene

BATCH = 64


def heatmap(scene: Scene, drawn: Rendering) -> np.ndarray:
    """Target of the detector: a peak of 1 at each object's centre, falling off with distance.

    Shape (len(OBJECTS), GRID, GRID) (CenterNet, arXiv 1904.07850, sec. 3).
    """
    target = np.zeros((len(OBJECTS), GRID, GRID), np.float32)
    y, x = np.mgrid[0:GRID, 0:GRID]
    for index, (cx, cy) in zip(scene.objects, drawn.centres * GRID, strict=True):
        i, j = min(int(cx), GRID - 1), min(int(cy), GRID - 1)
        peak = np.exp(-((x - i) ** 2 + (y - j) ** 2) / 2).astype(np.float32)
        target[index] = np.maximum(target[index], peak)
    return target


def train_inspector(art: Path, work: Path, minutes: float, device: str) -> None:
    """Writes `work/inspector`: weights, configuration and its accuracy on held-out scenes."""
    torch.manual_seed(0)
    sprites = load_sprites(art)
    model = Inspector().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    run = TimedRun(work / "inspector.pt", minutes, {"model": model, "optimizer": optimizer})
    for progress in run:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm_then_linear(progress, run.steps, 100)
        rng = np.random.default_rng((5, run.steps))
        scenes = [sample_training_scene(rng) for _ in range(BATCH)]
        drawn = [render(scene, sprites, rng) for scene in scenes]
        pixels = to_pixels(np.stack([d.image for d in drawn])).to(device)
        # Mild noise, so that a decoder's texture does not decide.
        pixels = pixels + 0.06 * torch.rand(BATCH, 1, 1, 1) * torch.randn(pixels.shape)
        target = torch.from_numpy(
            np.stack([heatmap(s, d) for s, d in zip(scenes, drawn, strict=True)])
        ).to(device)
        background = torch.tensor([s.background for s in scenes], device=device)
        with torch.autocast(device, torch.bfloat16):
            reading = model(pixels)
        loss = focal_loss(reading.heatmap_logits.float(), target)
        loss = loss + nn.functional.cross_entropy(reading.background_logits.float(), background)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.values = {"loss": loss.item()}

    model.eval()
    model.save(work / "inspector")
    scenes = held_out_scenes(2048, seed=7)
    rng = np.random.default_rng(8)
    pixels = to_pixels(np.stack([render(s, sprites, rng).image for s in scenes]))
    verdicts = [
        is_right(scene, found)
        for scene, found in zip(scenes, model.detect(pixels.to(device)), strict=True)
    ]
    accuracy = score(scenes, verdicts)
    print("inspector on 2048 held-out rendered scenes:", accuracy, flush=True)
    (work / "inspector" / "accuracy.json").write_text(json.dumps(accuracy, indent=2))


def focal_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Penalty-reduced focal loss (CenterNet, eq. 1), normalised by the number of objects."""
    p = torch.sigmoid(logits)
    peaks = target == 1
    positive = -(1 - p).square() * nn.functional.logsigmoid(logits) * peaks
    negative = -((1 - target) ** 4) * p.square() * nn.functional.logsigmoid(-logits)
    return (positive.sum() + (negative * ~peaks).sum()) / peaks.sum().clamp_min(1)
