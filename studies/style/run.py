"""Does a fine-tune survive distillation? A style LoRA on the embedded teacher, then distilled.

The style is a dark frame around every picture. A LoRA learns it by flow matching on the teacher's
own pictures, framed; a recipe with `teacher.loras` distils teacher and LoRA together. What is
measured on held-out prompts is how bright the frame's place is, and what the inspector finds.

python studies/style/run.py --out runs/style --minutes 6
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twostep.data.cache.build import open_cache
from twostep.data.prompts import load_prompts
from twostep.distill.trainer import Trainer
from twostep.evaluation.prompts import PromptSet
from twostep.evaluation.scorers import load_scorer
from twostep.families.family import PromptBatch
from twostep.inference.sampler import Sampler
from twostep.method.flow import add_noise, shift_sigma, velocity_target
from twostep.method.rollout import seeded_noise
from twostep.models.adapters import AdapterVelocity, SharedBackbone
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import LoraFile, save_lora
from twostep.recipe.models import Student
from twostep.recipe.schema import Recipe
from twostep.runtime.files import write_json
from twostep.runtime.provenance import stamp

TEACHER = "zoo:emoji-teacher"
FRAME, COLOUR = 3, torch.tensor([0.15, 0.10, 0.10])[:, None, None]  # pixels; red, green, blue
SIZE, RANK, BATCH, RATE = (64, 64), 8, 16, 1e-3
HELD_OUT = 256


def outside() -> Tensor:
    """The frame's pixels, (H, W)."""
    place = torch.ones(SIZE, dtype=torch.bool)
    place[FRAME:-FRAME, FRAME:-FRAME] = False
    return place


def framed(images: Tensor) -> Tensor:
    """Images in -1..1 with the frame."""
    return torch.where(outside(), 2 * COLOUR - 1, images)


def train_lora(folder: Path, *, pictures: int, turns: int) -> Path:
    """Flow matching on the teacher's pictures, framed; the LoRA's file, in diffusers' layout."""
    teacher = Sampler.load(TEACHER)
    prompts = load_prompts("emoji", pictures, seed=7)
    noise = seeded_noise(list(range(pictures)), teacher.noise_shape(*SIZE))
    clean = teacher.decoder.encode(framed(teacher.generate(prompts, noise, 8)))
    embeds = teacher.encoder.encode(prompts)
    backbone = SharedBackbone(
        teacher.velocities[0], ["style"], rank=RANK, target_modules=Student().target_modules, seed=0
    )
    style, parameters = AdapterVelocity(backbone, "style"), backbone.parameters("style")
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for turn in range(turns):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - turn / turns))
        rows = torch.randint(len(clean), (BATCH,), generator=generator).tolist()
        sigma = shift_sigma(torch.rand(BATCH, generator=generator), teacher.schedule.shift)
        fresh = torch.randn(clean[rows].shape, generator=generator)
        found = style(
            add_noise(clean[rows], fresh, sigma),
            sigma,
            PromptBatch.collate([embeds[row] for row in rows]),
        )
        loss = (found.velocity - velocity_target(clean[rows], fresh)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if turn % 100 == 0 or turn == turns - 1:
            print(f"LoRA turn {turn}: {loss.item():.4f}", flush=True)
    matrices = {}
    for name, layer in backbone.layers.items():
        for side in ("lora_A", "lora_B"):
            weight = getattr(layer, side)["style"].weight.detach()
            matrices[f"{name}.{side}.weight"] = weight.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    return save_lora(matrices, RANK, folder, "frame.safetensors")


def interval(values: Tensor) -> dict[str, float]:
    """Mean of one value a prompt, and half of its 95% interval."""
    half = 1.96 * values.std() / len(values) ** 0.5
    return {"mean": round(values.mean().item(), 4), "interval": round(half.item(), 4)}


def measure(lora: Path, student: Path) -> dict[str, dict[str, Any]]:
    """By model: the frame's brightness (0..1), its distance to the tuned teacher's, accuracy."""
    tuned = ModelFolder.open(TEACHER).with_loras([LoraFile.open(lora)])
    prompts = PromptSet.load("emoji", HELD_OUT, seeds_per_prompt=1)
    inspect = load_scorer("inspector")
    models: dict[str, tuple[str | ModelFolder, int]] = {
        "teacher_8": (TEACHER, 8),
        "tuned_8": (tuned, 8),
        "tuned_2": (tuned, 2),
        "student_2": (str(student), 2),
        "shipped_2": ("zoo:emoji-student", 2),
    }
    figures: dict[str, dict[str, Any]] = {}
    found: dict[str, Tensor] = {}

    def look(name: str, images: Tensor) -> None:
        found[name] = ((images + 1) / 2)[:, :, outside()].mean((1, 2))
        right = inspect(images, prompts)["accuracy.overall"]
        figures[name] = {"frame": interval(found[name]), "accuracy": interval(right)}

    for name, (model, steps) in models.items():
        sampler = Sampler.load(model)
        noise = seeded_noise(list(range(10_000, 10_000 + HELD_OUT)), sampler.noise_shape(*SIZE))
        images = sampler.generate(prompts.prompts, noise, steps)
        look(name, images)
        if name == "teacher_8":  # what the LoRA was shown: as well as it can be
            look("painted", sampler.decoder.decode(sampler.decoder.encode(framed(images))))
    for name, values in found.items():
        figures[name]["from_tuned"] = interval(values - found["tuned_8"])  # prompt by prompt
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/style"))
    parser.add_argument("--minutes", type=float, default=6.0, help="of distillation")
    parser.add_argument("--pictures", type=int, default=512, help="that the LoRA learns from")
    parser.add_argument("--lora-turns", type=int, default=600)
    parser.add_argument("--prompts", type=int, default=768, help="of the distillation")
    parser.add_argument("--fit-turns", type=int, default=200)
    parser.add_argument("--results", type=Path, help="a JSON file; OUT/style.json without it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lora = options.out / "frame.safetensors"
    if not lora.is_file():
        lora = train_lora(options.out, pictures=options.pictures, turns=options.lora_turns)
    overrides = [
        f"name={options.out.name}-run",
        f"output={options.out}",
        f"data.cache={options.out}/cache",
        f"data.prompt_count={options.prompts}",
        f"score.fit_turns={options.fit_turns}",
        f"training.minutes={options.minutes}",
        f"teacher.loras=[{lora}]",
    ]
    recipe = Recipe.load("zoo:emoji-demo", overrides)
    trainer = Trainer(recipe, open_cache(recipe))
    student = trainer.train()
    results = {
        "command": f"python studies/style/run.py {shlex.join(sys.argv[1:])}".strip(),
        **stamp(),
        "held_out": HELD_OUT,
        "lora": {"rank": RANK, "turns": options.lora_turns, "pictures": options.pictures},
        "distillation": {
            "prompts": options.prompts,
            "minutes": options.minutes,
            "turns": trainer.progress.turn,
            "score_turns": trainer.progress.score_turn,
        },
        "models": measure(lora, student),
    }
    write_json(options.results or options.out / "style.json", results)
    for name, model in results["models"].items():
        print(name, model)


if __name__ == "__main__":
    main()
