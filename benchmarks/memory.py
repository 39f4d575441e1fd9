"""Ways to hold a student: what each takes, costs, and does to the picture.

python benchmarks/memory.py --out docs/results/memory.json

Measured on a student that is there; computed, by the accounting of `twostep plan`, for one of
Z-Image Turbo's size. The ways take turns, several rounds of them, and the best round counts.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from torch import nn

from twostep.evaluation.metrics import peak_signal_to_noise
from twostep.evaluation.prompts import PromptSet
from twostep.exports.registry import ExportOptions, export
from twostep.families.family import PromptBatch
from twostep.inference.generate import SamplerOptions
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.models.folder import ModelFolder
from twostep.models.int8 import KEPT, pack_int8
from twostep.planning.generation import Steps, generation_needs
from twostep.runtime.devices import MODES, Memory, pick_device
from twostep.runtime.files import write_json
from twostep.runtime.memory_meter import live_bytes, weight_bytes
from twostep.runtime.provenance import stamp

# What the real model is asked for, in pixels and tokens.
REAL_SIZE, REAL_TOKENS = (1024, 1024), 128
# Linear layers by what they do, to see what 8 bits cost each.
KINDS = {
    "attention": "attention",
    "feed-forward": "feed_forward",
    "modulation": "adaLN_modulation",
    "noise level": "t_embedder",
    "caption": "cap_embedder",
    "image in": "all_x_embedder",
    "image out": "all_final_layer",
}


@dataclass(frozen=True)
class Way:
    """How a student is held."""

    steps: Steps
    memory: Memory
    model: str

    @property
    def key(self) -> str:
        return f"{self.steps}, {self.memory}"


class Bench:
    """The same pictures, made from weights held in different ways."""

    def __init__(
        self, device: torch.device, *, size: tuple[int, int], batch: int, images: int
    ) -> None:
        self.device, self.size, self.batch = device, size, batch
        self.prompts = list(PromptSet.load("emoji", images, 1).captions)

    def load(self, way: Way) -> Sampler:
        options = SamplerOptions(way.memory, device=self.device)
        return options.load(ModelFolder.open(way.model), self.prompts)

    def pictures(self, sampler: Sampler) -> torch.Tensor:
        noise = seeded_noise(list(range(len(self.prompts))), sampler.noise_shape(*self.size))
        return sampler.generate(self.prompts, noise)

    def seconds(self, sampler: Sampler) -> float:
        """One batch from encoded prompts to pixels."""
        run = self._one_batch(sampler)
        run()
        started = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def peak(self, sampler: Sampler) -> int:
        """Bytes alive at the peak of one batch, weights included."""
        run = self._one_batch(sampler)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated()
        run()
        with live_bytes() as live:
            run()
        return live.peak + held_bytes(sampler) + weight_bytes(sampler.decoder.vae)

    def _one_batch(self, sampler: Sampler) -> Callable[[], None]:
        prompts = self.prompts[: self.batch]
        batch = PromptBatch.collate(sampler.encoder.encode(prompts), self.device)
        noise = seeded_noise(list(range(len(prompts))), sampler.noise_shape(*self.size))
        noise = noise.to(self.device)

        def run() -> None:
            sampler.decoder.decode(sampler.roll(batch, noise).latents)

        return run


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over the pictures."""
    return peak_signal_to_noise(a, b).mean().item()


def held_bytes(sampler: Sampler) -> int:
    """Both steps' transformers, on whatever device."""
    return weight_bytes(*(v for v in sampler.velocities if isinstance(v, nn.Module)))


def by_kind(bench: Bench, student: str, whole: torch.Tensor) -> list[dict[str, Any]]:
    """What 8 bits in one kind of layer alone save, and do to the picture."""
    found = []
    for kind, part in KINDS.items():
        sampler = bench.load(Way("two_sets", "plain", student))
        before = held_bytes(sampler)
        for network in sampler.velocities:
            pack_int8(network, lambda name, _, part=part: part in name)
        found.append({
            "kind": kind,
            "packed": not KEPT.fullmatch(part),
            "saved": 1 - held_bytes(sampler) / before,
            "decibels": decibels(bench.pictures(sampler), whole),
        })  # fmt: skip
    return found


def main(
    student: Annotated[str, typer.Option()] = "zoo:emoji-student",
    teacher: Annotated[str, typer.Option()] = "zoo:emoji-teacher",
    real: Annotated[str, typer.Option(help="whose needs are computed")] = (
        "Tongyi-MAI/Z-Image-Turbo"
    ),
    energy: Annotated[float, typer.Option(help="share of the change in the LoRA files")] = 0.9,
    real_rank: Annotated[int, typer.Option(help="of the real model's LoRA files")] = 64,
    size: Annotated[int, typer.Option(help="pixels of the measured pictures")] = 64,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    images: Annotated[int, typer.Option(min=8, help="for the picture's figures")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    device: Annotated[str, typer.Option()] = "auto",
    out: Annotated[Path, typer.Option()] = Path("runs/benchmarks/memory.json"),
) -> None:
    """Measures every way, computes the real model's, and writes one JSON file."""
    bench = Bench(
        pick_device(device, option="--device"), size=(size, size), batch=batch, images=images
    )
    with tempfile.TemporaryDirectory() as folder:
        pair = str(Path(folder) / "pair")
        notes = export(student, "lora", Path(pair), ExportOptions(teacher=teacher, energy=energy))
        print("\n".join(notes))
        models: dict[Steps, str] = {"two_sets": student, "lora": pair}
        ways = [Way(s, m, models[s]) for s in get_args(Steps) for m in MODES]
        samplers = {way: bench.load(way) for way in ways}
        whole = bench.pictures(samplers[ways[0]])
        seconds: dict[Way, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                seconds[way].append(bench.seconds(samplers[way]))
        fastest = {way: min(values) for way, values in seconds.items()}
        found = []
        for way in ways:
            needs = generation_needs(
                real,
                steps=way.steps,
                memory=way.memory,
                size=REAL_SIZE,
                batch_size=1,
                prompt_tokens=REAL_TOKENS,
                rank=real_rank,
            )
            found.append({
                "key": way.key,
                "steps": way.steps,
                "memory": way.memory,
                "weights": held_bytes(samplers[way]),
                "peak": None if way.memory == "offload" else bench.peak(samplers[way]),
                "time": fastest[way] / fastest[ways[0]],
                "decibels": decibels(bench.pictures(samplers[way]), whole),
                "real": needs.as_json(),
            })  # fmt: skip
            print(json.dumps(found[-1]))
        kinds = by_kind(bench, student, whole)
    results = {
        "command": shlex.join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        **stamp(),
        "size": size, "batch": batch, "images": images, "rounds": rounds,
        "lora": notes, "energy": energy, "real": real, "real_size": REAL_SIZE,
        "real_tokens": REAL_TOKENS, "real_rank": real_rank,
        "ways": found, "kinds": kinds,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    print(out)


if __name__ == "__main__":
    typer.run(main)
