"""What 8-bit and GGUF weights do to a student's pictures, against its own in fp32.

Files are written by `twostep export` and read back: GGUF by diffusers' own loader, ComfyUI's 8-bit
files by what their layout says (ComfyUI itself runs them in tests/exports/test_in_comfyui.py).

python benchmarks/small_weights.py --out docs/results/small-weights.json
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel
from safetensors.torch import load_file

from twostep.evaluation.metrics import peak_signal_to_noise
from twostep.evaluation.prompts import PromptSet
from twostep.exports.packed import unpack
from twostep.exports.registry import ExportOptions, export
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.models.folder import ModelFolder
from twostep.models.student import PARTS, STEPS
from twostep.models.transformer import transformer_with
from twostep.runtime.devices import Placement
from twostep.runtime.files import write_json
from twostep.runtime.provenance import stamp

CASES: dict[str, tuple[str, str]] = {
    "comfyui, fp8": ("comfyui", "fp8"),
    "comfyui, int8": ("comfyui", "int8"),
    "gguf, q8_0": ("gguf", "q8_0"),
    "gguf, q4_k": ("gguf", "q4_k"),
}


def velocities(folder: ModelFolder, out: Path, target: str) -> tuple[Any, ...]:
    """Both steps, of exported files."""
    found = []
    for step, part in zip(STEPS, PARTS, strict=True):
        if target == "gguf":
            model = ZImageTransformer2DModel.from_single_file(
                str(out / f"{step}.gguf"),
                config=str(folder.base),
                subfolder=part,
                quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
                torch_dtype=torch.float32,
            )
        else:
            weights = unpack(load_file(out / f"{step}.safetensors"), torch.float32)
            like = folder.family.without_weights(folder.base, part, torch.float32)
            whole = {k: v.float() for k, v in folder.family.whole_weights(weights).items()}
            model = transformer_with(like, whole)
        found.append(folder.family.as_velocity(model.eval()))
    return tuple(found)


def main(
    out: Annotated[Path, typer.Option()],
    model: Annotated[str, typer.Option()] = "zoo:emoji-student",
    images: Annotated[int, typer.Option()] = 64,
    size: Annotated[int, typer.Option()] = 64,
) -> None:
    torch.set_num_threads(1)
    folder = ModelFolder.open(model)
    prompts = PromptSet.load("emoji", images, seeds_per_prompt=1).prompts
    sampler = Sampler.load(folder)
    noise = seeded_noise(list(range(images)), sampler.noise_shape(size, size))
    plain = sampler.generate(prompts, noise)
    whole = sum(p.numel() * 2 for v in sampler.velocities for p in v.parameters())
    ways: dict[str, dict[str, Any]] = {}

    def look(name: str, size_in_bytes: int, lines: list[str]) -> None:
        decibels = peak_signal_to_noise(plain, sampler.generate(prompts, noise))
        ways[name] = {
            "decibels": round(decibels.mean().item(), 1),
            "lowest": round(decibels.min().item(), 1),
            "of_bf16": round(size_in_bytes / whole, 3),
            "lines": lines,
        }
        print(name, ways[name], flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        for name, (target, weights) in CASES.items():
            written = Path(temporary) / name
            lines = export(model, target, written, ExportOptions(weights=weights))
            files = [
                written / f"{s}.{'gguf' if target == 'gguf' else 'safetensors'}" for s in STEPS
            ]
            sampler.velocities = velocities(folder, written, target)
            look(name, sum(f.stat().st_size for f in files), lines)
    for memory in ("int8", "fp8"):
        placement = Placement(torch.device("cpu"), torch.float32, memory)
        sampler.velocities = folder.velocities(placement)
        held = sum(
            t.numel() * (1 if t.element_size() == 1 else 2)
            for v in sampler.velocities
            for t in v.state_dict().values()
        )
        look(f"--memory {memory}", held, [])
    results = {
        "command": f"python benchmarks/small_weights.py {shlex.join(sys.argv[1:])}",
        **stamp(),
        "model": model,
        "images": images,
        "size": size,
        "ways": ways,
    }
    write_json(out, results)


if __name__ == "__main__":
    typer.run(main)
