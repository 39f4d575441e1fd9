"""Warm times of a model, from prompt to pixels, and where they go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from twostep.families.family import PromptBatch
from twostep.inference.sampler import Sampler
from twostep.runtime.memory_meter import live_bytes, weight_bytes

_WARM_UP = 1


@dataclass(frozen=True)
class Latency:
    """Seconds per image of one batch, the best of a few runs.

    Attributes:
        total: from prompt to pixels.
        text, steps, decode: its parts, `steps` one by one.
        peak_memory_bytes: weights included, text encoder too; on a CPU of tensors alone.
    """

    total: float
    text: float
    steps: list[float]
    decode: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure_latency(
    sampler: Sampler,
    prompts: list[str],
    noise: Tensor,
    *,
    steps: int | None = None,
    guidance_scale: float = 0.0,
    sigmas: Sequence[float] | None = None,
    keep_prompts: bool = False,
    runs: int = 3,
) -> Latency:
    """Times `sampler` on one batch of prompts and noise (B, C, H, W).

    Args:
        steps, guidance_scale, sigmas: as `Sampler.sample` takes them.
        keep_prompts: encoded prompts are remembered, as for a prompt that comes again.
        runs: of which the best counts.
    """
    device = sampler.device
    options = {"steps": steps, "guidance_scale": guidance_scale, "sigmas": sigmas}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    readings = []
    for number in range(_WARM_UP + runs):
        if not keep_prompts:
            sampler.encoder.forget()
        marks = _one_run(sampler, prompts, noise, options=options)
        if number >= _WARM_UP:
            readings.append(marks)
    best = min(readings, key=lambda marks: marks[-1] - marks[0])
    parts = [(b - a) / len(prompts) for a, b in pairwise(best)]
    text, *per_step, decode = parts
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        with live_bytes() as live:
            _one_run(sampler, prompts, noise, options=options)
        memory = live.peak + weight_bytes(*sampler.modules())
    return Latency(
        total=sum(parts), text=text, steps=per_step, decode=decode, peak_memory_bytes=memory
    )


def _one_run(
    sampler: Sampler, prompts: list[str], noise: Tensor, *, options: dict[str, Any]
) -> list[float]:
    """Clock readings: before, after the text, after each step, after decoding."""
    marks: list[float] = []

    def mark() -> None:
        if sampler.device.type == "cuda":
            torch.cuda.synchronize(sampler.device)
        marks.append(time.perf_counter())

    mark()
    batch = PromptBatch.collate(sampler.encoder.encode(prompts), sampler.device)
    noise = noise.to(sampler.device)
    mark()
    sampler.decoder.decode(sampler.roll(batch, noise, **options, on_step=mark).latents)
    mark()
    return marks
