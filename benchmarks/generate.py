"""Speed and memory of a two-step student against its teacher, each case in a process of its own.

python benchmarks/generate.py --out docs/results/generate.json

A case is a model, a number of steps, a batch size and options. The cases take turns, several rounds
of them, so that a machine that slows down slows all of them; the best round counts.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

# Warm runs in each process, of which the best counts.
_RUNS = 10
# The fast path's options by their names in the table; each has those before it, too.
OPTIONS = ("plain", "prompt cache", "tiny decoder", "compiled")


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    model: str
    steps: int | None
    batch: int
    option: str
    size: int
    device: str
    dtype: str
    decoder: str

    @property
    def key(self) -> str:
        steps = 2 if self.steps is None else self.steps
        return f"{steps} steps, batch {self.batch}, {self.option}"


def measure(case: Case) -> dict[str, Any]:
    """Runs one case in this process."""
    import torch

    from twostep.evaluation.latency import measure_latency
    from twostep.evaluation.prompts import PromptSet
    from twostep.inference.sampler import Sampler
    from twostep.method.rollout import seeded_noise
    from twostep.runtime.devices import Placement, pick_device

    device = pick_device(case.device, option="--device")
    level = OPTIONS.index(case.option)
    decoder = case.decoder if level >= OPTIONS.index("tiny decoder") else None
    dtype = getattr(torch, case.dtype)
    placement = Placement(device, dtype)
    sampler = Sampler.load(case.model, placement=placement, tiny_decoder=decoder)
    if level >= OPTIONS.index("compiled"):
        sampler.compile()
    prompts = list(PromptSet.load("emoji", max(4, case.batch), 1).captions[: case.batch])
    noise = seeded_noise(list(range(case.batch)), sampler.noise_shape(case.size, case.size))
    keep = level >= OPTIONS.index("prompt cache")
    return measure_latency(
        sampler, prompts, noise, steps=case.steps, keep_prompts=keep, runs=_RUNS
    ).as_dict()


def in_own_process(case: Case) -> dict[str, Any]:
    """Measures `case` in a fresh process, so that its peak memory is its own."""
    result = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(asdict(case))],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if result.returncode:
        raise RuntimeError(f"{case.key}: {result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main(
    teacher: Annotated[str, typer.Option()] = "zoo:emoji-teacher",
    student: Annotated[str, typer.Option()] = "zoo:emoji-student",
    steps: Annotated[int, typer.Option(min=1, help="the teacher's")] = 8,
    batch: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    option: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(OPTIONS)}")] = None,
    size: Annotated[int, typer.Option(help="pixels")] = 64,
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "float32",
    decoder: Annotated[str, typer.Option(help="the tiny one")] = "zoo:emoji-tiny-decoder",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option()] = Path("runs/benchmarks/generate.json"),
    case: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Times every case and writes one JSON file."""
    if case:
        print(json.dumps(measure(Case(**json.loads(case)))))
        return
    chosen = option or list(OPTIONS)
    unknown = sorted(set(chosen) - set(OPTIONS))
    if unknown:
        raise typer.BadParameter(f"unknown options {unknown}; there are: {', '.join(OPTIONS)}")
    cases = [
        Case(model, number, count, name, size, device, dtype, decoder)
        for count in batch or (1, 4, 16)
        for name in chosen
        for model, number in ((teacher, steps), (student, None))
    ]
    runs: dict[str, list[dict[str, Any]]] = {c.key: [] for c in cases}
    for number in range(rounds):
        for c in cases:
            runs[c.key].append(in_own_process(c))
            print(f"round {number + 1}: {c.key}: {1e3 * runs[c.key][-1]['total']:.1f} ms an image")
    write(cases, runs, out, rounds=rounds, steps=steps)


def write(
    cases: Sequence[Case],
    runs: dict[str, list[dict[str, Any]]],
    out: Path,
    *,
    rounds: int,
    steps: int,
) -> None:
    """The best round of each case, and each student's time relative to its teacher's."""
    from twostep.runtime.files import write_json
    from twostep.runtime.provenance import stamp

    best = {key: min(found, key=lambda f: f["total"]) for key, found in runs.items()}
    results = {
        "command": shlex.join(["python", "benchmarks/generate.py", *sys.argv[1:]]),
        **stamp(),
        "rounds": rounds,
        "teacher_steps": steps,
        "dtype": cases[0].dtype,
        "cases": [
            asdict(c)
            | {"key": c.key, "steps_taken": c.steps or 2, **best[c.key]}
            | {"ratio": best[c.key]["total"] / best[_teacher_of(c, steps)]["total"]}
            for c in cases
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    print(out)


def _teacher_of(case: Case, steps: int) -> str:
    return Case(**asdict(case) | {"steps": steps}).key


if __name__ == "__main__":
    typer.run(main)
