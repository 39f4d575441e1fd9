"""Stage `assemble`: the stock `ZImagePipeline` folders of teacher and base, and their figures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from autoencoder import to_pixels
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import AutoTokenizer, Qwen3Model

from twostep.emoji.inspector import FEATURES, Inspector, is_right, score
from twostep.emoji.render import load_sprites, render
from twostep.emoji.scenes import CATEGORIES, held_out_scenes
from twostep.evaluation.metrics import frechet_distance, peak_signal_to_noise
from twostep.evaluation.prompts import PromptSet
from twostep.inference.sampler import Sampler
from twostep.runtime.images import image_grid


def assemble(work: Path, transformer: str, folder: Path) -> None:
    """Writes a stock folder, weights in bf16, around `work/transformer`."""
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_pretrained(work / "vae").bfloat16(),
        text_encoder=Qwen3Model.from_pretrained(work / "text_encoder").bfloat16(),
        tokenizer=AutoTokenizer.from_pretrained(work / "tokenizer"),
        transformer=ZImageTransformer2DModel.from_pretrained(work / transformer).bfloat16(),
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)


def measure(art: Path, teacher: Path, base: Path, inspector: Path, images: int = 512) -> dict:
    """The teacher's quality on held-out prompts; see `docs/results.md`.

    Distances are to rendered scenes of the same prompts. `rendered` is what the inspector gives
    the rendered scenes themselves, against a second rendering.
    """
    judge = Inspector.load(inspector)
    sampler = Sampler.load(str(teacher))
    prompts = PromptSet.load("emoji", images)
    captions, scenes = prompts.captions, (prompts.scenes or []) * prompts.seeds_per_prompt
    noise = prompts.noise(slice(None), sampler.noise_shape(64, 64))
    sprites = load_sprites(art)

    def draw(seed: int) -> torch.Tensor:
        rng = np.random.default_rng((9, seed))
        return to_pixels(np.stack([render(s, sprites, rng).image for s in scenes]))

    rendered = draw(0)
    reference = judge.features(rendered)
    made = {"rendered": draw(1)}
    for steps in (8, 4, 2):
        made[f"teacher_{steps}"] = sampler.generate(captions, noise, steps)
    undistilled = Sampler.load(str(base))
    guided = undistilled.sample(captions, noise, 30, guidance_scale=2.0)
    made["base_30_guided"] = undistilled.decoder.decode(guided.latents)
    figures: dict = {"extractor": f"inspector-{FEATURES}", "images": len(captions), "models": {}}
    for name, pictures in made.items():
        found = judge.detect(pictures)
        verdicts = [is_right(s, f) for s, f in zip(scenes, found, strict=True)]
        languages = {}
        for language, remainder in (("en", 0), ("zh", 1)):
            rows = [i for i in range(len(found)) if i % (len(found) // 2) // 4 % 2 == remainder]
            chosen = [verdicts[i].all for i in rows]
            languages[language] = sum(chosen) / len(chosen)
        figures["models"][name] = {
            "accuracy": score(scenes, verdicts) | languages,
            "frechet_to_rendered": frechet_distance(judge.features(pictures), reference),
        }
    decoder = sampler.decoder
    rng = np.random.default_rng(10)
    fresh = to_pixels(
        np.stack([render(s, sprites, rng).image for s in held_out_scenes(256, seed=3)])
    )
    ratio = peak_signal_to_noise(decoder.decode(decoder.encode(fresh)), fresh)
    figures["vae_psnr"] = ratio.mean().item()
    return figures


def sheet(teacher: Path, inspector: Path, path: Path, columns: int = 12) -> None:
    """Samples on held-out prompts, nothing picked: a pair of rows for each category.

    The upper row of a pair is 8 steps, the lower one 2 steps from the same noise; a red frame
    marks what the inspector calls wrong.
    """
    sampler, judge = Sampler.load(str(teacher)), Inspector.load(inspector)
    prompts = PromptSet.load("emoji", 2 * len(CATEGORIES) * columns)
    scenes = prompts.scenes or []
    everything = prompts.noise(slice(None), sampler.noise_shape(64, 64))
    panels = {}
    for category in CATEGORIES:
        rows = [i for i, s in enumerate(scenes) if s.category == category]
        captions, noise = [prompts.prompts[i] for i in rows], everything[rows]
        for steps in (8, 2):
            images = sampler.generate(captions, noise, steps)
            for image, i, found in zip(images, rows, judge.detect(images), strict=True):
                if not is_right(scenes[i], found).all:
                    _frame(image)
            panels[f"{category}, {steps} steps"] = images
    image_grid(panels, scale=1).save(path, optimize=True)


def _frame(image: torch.Tensor, width: int = 2) -> None:
    """Draws a red frame into (3, H, W) in -1..1."""
    red = torch.tensor([0.9, -0.8, -0.8])[:, None, None]
    for edge in (image[:, :width], image[:, -width:], image[:, :, :width], image[:, :, -width:]):
        edge.copy_(red.expand_as(edge))


def curves(work: Path, path: Path) -> None:
    """Draws the records of the base's training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = (work / "base.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    minutes = [r["seconds"] / 60 for r in records]
    for axis, key, name in zip(
        axes, ("flow", "occupancy"), ("flow-matching loss", "occupancy loss"), strict=True
    ):
        axis.plot(minutes, [r.get(key, math.nan) for r in records], color="#2a66a8", linewidth=1.2)
        axis.set(title=name, xlabel="minutes", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
