"""What a rehearsal times once the student is there: matrices, pictures, the largest batch."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from train_step import matrix_rate

from twostep.evaluation.latency import measure_latency
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.runtime.devices import Memory, Placement, pick_device

_PROMPT = "a red fox in the snow"
_MOST = 64


def time_all(teacher: str, student: str, *, size: int, device: str, out: Path) -> None:
    """Writes a line to `out` for each thing that is timed."""
    chosen = pick_device(device, option="--device")
    with out.open("a") as file:
        for line in _lines(teacher, student, size, chosen):
            print(json.dumps(line), file=file, flush=True)


def _lines(teacher: str, student: str, size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    yield {"name": "matrix rate", "operations_per_second": matrix_rate(device, 5)}
    cases: list[tuple[str, str, Memory]] = [
        ("teacher, 8 steps", teacher, "plain"),
        ("student", student, "plain"),
        ("student, int8", student, "int8"),
        ("student, offload", student, "offload"),
    ]
    for name, model, memory in cases:
        yield {"name": name, "batch": 1, **_latency(model, memory, size, device, batch=1)}
    batch, most = 2, _MOST if device.type == "cuda" else 2
    while batch <= most:
        try:
            found = _latency(student, "plain", size, device, batch=batch)
        except torch.OutOfMemoryError:
            yield {"name": "student", "batch": batch, "fits": False}
            return
        yield {"name": "student", "batch": batch, "fits": True, **found}
        batch *= 2


def _latency(
    model: str, memory: Memory, size: int, device: torch.device, *, batch: int
) -> dict[str, Any]:
    """Seconds an image from prompt to pixels, and the peak of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = Placement.on(device).dtype
    sampler = Sampler.load(model, placement=Placement(device, dtype, memory))
    noise = seeded_noise(list(range(batch)), sampler.noise_shape(size, size))
    return measure_latency(sampler, [_PROMPT] * batch, noise, runs=2).as_dict()
