"""Trains the second judge on rendered scenes; writes its weights beside it.

python studies/evidence/train_second_judge.py            4,000 steps; needs npm once, for the art
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from second_judge import WEIGHTS, Opinion, SecondJudge, verdicts
from torch import Tensor
from torch.nn.functional import avg_pool2d, nll_loss, smooth_l1_loss

from twostep.emoji.art import fetch_art
from twostep.emoji.inspector import score
from twostep.emoji.render import Rendering, load_sprites, render
from twostep.emoji.scenes import OBJECTS, Scene, held_out_scenes, sample_training_scene
from twostep.runtime.files import write_json
from twostep.runtime.provenance import stamp

BATCH, RATE = 64, 2e-3
# Streams of numpy's generator that nothing else draws from.
TRAINING, HELD_OUT = 1801, 1802


def main(
    steps: Annotated[int, typer.Option(min=1)] = 4000,
    out: Annotated[Path, typer.Option(help="for the art")] = Path("runs/second-judge"),
) -> None:
    """Trains for `steps` batches and says how often it reads held-out renderings rightly."""
    torch.manual_seed(1803)
    out.mkdir(parents=True, exist_ok=True)
    sprites = load_sprites(fetch_art(out))
    model = SecondJudge().to(memory_format=torch.channels_last)  # twice as fast on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.02)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 200, 1.0) * (1 - step / steps)
        rng = np.random.default_rng((TRAINING, step))
        scenes = [sample_training_scene(rng) for _ in range(BATCH)]
        drawn = [render(scene, sprites, rng) for scene in scenes]
        pixels = _disturbed(_pixels(drawn), torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            opinion = model(pixels)
        loss = _loss(opinion, scenes, drawn)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}, {seconds:.0f} s: loss {loss.item():.3f}", flush=True)
    model.eval().save()
    found = SecondJudge.load()
    scenes = held_out_scenes(2048, seed=HELD_OUT)
    rng = np.random.default_rng(HELD_OUT)
    pixels = _pixels([render(scene, sprites, rng) for scene in scenes])
    accuracy = score(scenes, verdicts(found.opinion(pixels), scenes))
    record = {"accuracy": accuracy, "renderings": len(scenes), "steps": steps, **stamp()}
    write_json(WEIGHTS.with_suffix(".json"), record)
    print(json.dumps(accuracy, indent=2))


def _pixels(drawn: list[Rendering]) -> Tensor:
    images = np.stack([d.image for d in drawn])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def _disturbed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise and a shift of brightness, so that a decoder's texture does not decide."""
    shape = (len(pixels), 1, 1, 1)
    blur = torch.rand(shape, generator=generator)
    pixels = torch.lerp(pixels, avg_pool2d(pixels, 3, 1, 1, count_include_pad=False), blur)
    noise = torch.randn(pixels.shape, generator=generator)
    pixels = pixels + 0.08 * torch.rand(shape, generator=generator) * noise
    return pixels + 0.06 * torch.randn(shape, generator=generator)


def _loss(opinion: Opinion, scenes: list[Scene], drawn: list[Rendering]) -> Tensor:
    counts = torch.zeros(len(scenes), len(OBJECTS), dtype=torch.int64)
    centres = torch.zeros(len(scenes), len(OBJECTS), 2)
    for row, (scene, picture) in enumerate(zip(scenes, drawn, strict=True)):
        for kind, count in Counter(scene.objects).items():
            counts[row, kind] = count
        for kind, centre in zip(scene.objects, picture.centres, strict=True):
            centres[row, kind] = torch.from_numpy(centre)
    background = torch.tensor([scene.background for scene in scenes])
    alone = counts == 1
    place = smooth_l1_loss(opinion.centres[alone], centres[alone], beta=0.1)
    count = nll_loss(opinion.counts.flatten(0, 1), counts.flatten(), reduction="sum") / len(scenes)
    return count + nll_loss(opinion.backgrounds, background) + 10 * place


if __name__ == "__main__":
    typer.run(main)
