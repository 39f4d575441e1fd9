"""Does a style LoRA that was trained on the teacher work on the student, which never saw it?

The LoRA is the one of run.py, a dark frame. It is added to the shipped student's first step, second
step, or both, at two scales; measured on held-out prompts are how bright the frame's place is and
what the inspector finds, beside the teacher with the same LoRA at 8 steps and, undistilled, at 2.

python studies/style/carry.py --lora runs/style/frame.safetensors --results docs/results/carry.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from run import SIZE, TEACHER, interval, outside, train_lora
from torch import Tensor

from twostep.evaluation.prompts import PromptSet
from twostep.evaluation.scorers import load_scorer
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import LoraFile
from twostep.runtime.files import write_json
from twostep.runtime.provenance import stamp

STUDENT = "zoo:emoji-student"


def tuned(model: str, lora: Path, scales: tuple[float, float]) -> Sampler:
    """The model with the LoRA in its steps, a scale for each; a teacher's is the first."""
    parts = []
    for scale in dict.fromkeys(scales):
        folder = ModelFolder.open(model)
        if scale:
            folder = folder.with_loras([LoraFile.open(lora, scale)])
        parts.append(Sampler.load(folder))
    sampler, last = parts[0], parts[-1]
    if sampler.is_student:
        sampler.velocities = (sampler.velocities[0], last.velocities[1])
    return sampler


def measure(lora: Path, held_out: int) -> dict[str, dict[str, Any]]:
    """By model: the frame's brightness (0..1), its distance to the tuned teacher's, accuracy."""
    prompts = PromptSet.load("emoji", held_out, seeds_per_prompt=1)
    inspect = load_scorer("inspector")
    cases: list[tuple[str, str, tuple[float, float], int]] = [
        ("teacher, 8 steps", TEACHER, (0, 0), 8),
        ("student, 2 steps", STUDENT, (0, 0), 2),
    ]
    for scale in (1.0, 0.5):
        cases += [
            (f"teacher and LoRA at {scale:g}, 8 steps", TEACHER, (scale, scale), 8),
            (f"teacher and LoRA at {scale:g}, 2 steps", TEACHER, (scale, scale), 2),
            (f"student and LoRA at {scale:g}, both steps", STUDENT, (scale, scale), 2),
        ]
    cases += [
        ("student and LoRA at 1, step 1 alone", STUDENT, (1.0, 0), 2),
        ("student and LoRA at 1, step 2 alone", STUDENT, (0, 1.0), 2),
    ]
    figures: dict[str, dict[str, Any]] = {}
    found: dict[str, Tensor] = {}
    for name, model, scales, steps in cases:
        sampler = tuned(model, lora, scales)
        noise = seeded_noise(list(range(10_000, 10_000 + held_out)), sampler.noise_shape(*SIZE))
        images = sampler.generate(prompts.prompts, noise, steps)
        found[name] = ((images + 1) / 2)[:, :, outside()].mean((1, 2))
        figures[name] = {
            "frame": interval(found[name]),
            "accuracy": interval(inspect(images, prompts)["accuracy.overall"]),
        }
        print(name, figures[name], flush=True)
    wanted = found["teacher and LoRA at 1, 8 steps"], found["teacher and LoRA at 0.5, 8 steps"]
    for name, values in found.items():
        figures[name]["from_tuned"] = interval(values - wanted["0.5" in name])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lora", type=Path, default=Path("runs/style/frame.safetensors"))
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--results", type=Path, default=Path("docs/results/carry.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.lora.is_file():
        options.lora = train_lora(options.lora.parent, pictures=512, turns=700)
    results = {
        "command": f"python studies/style/carry.py {shlex.join(sys.argv[1:])}".strip(),
        **stamp(),
        "held_out": options.held_out,
        "models": measure(options.lora, options.held_out),
    }
    write_json(options.results, results)


if __name__ == "__main__":
    main()
