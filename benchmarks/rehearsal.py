"""All of docs/z-image.md on random weights, each stage's time and memory against the plan.

python benchmarks/rehearsal.py                                  # Z-Image Turbo's size, on a CPU
python benchmarks/rehearsal.py --layers 8 --text-layers 8       # its width with fewer layers
python benchmarks/rehearsal.py --device cuda --timing           # one 80 GB GPU, 1024 pixels
python benchmarks/rehearsal.py --scale small --out runs/small   # a minute's test of the script

Nothing is downloaded. Each command runs in a process of its own; inside, the stages are measured
one by one (`rehearsal_child.py`). What is done is written after each command.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from rehearsal_folder import write_random_folder

from twostep.runtime.files import write_json
from twostep.runtime.provenance import stamp

_HERE = Path(__file__).parent
_CHILD = _HERE / "rehearsal_child.py"
# Freed memory goes back to the system at once, so that a stage's peak is its own.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
_KEPT_OUT = ("MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")

Scale = Literal["real", "small"]


def recipe_for(scale: Scale, *, device: str, depth: int, model: Path, out: Path) -> dict[str, Any]:
    """A recipe that has every stage, in a few turns."""
    gpu = device == "cuda"
    small = scale == "small"
    size = 1024 if gpu and not small else 128 if not small else 32
    layers = [int(depth * share) for share in (0.47, 0.74, 0.94)] if depth > 3 else [0, depth - 1]
    return {
        "name": "rehearsal",
        "teacher": {"model": str(model), "steps": 8, "dtype": "bfloat16"},
        "score": {"fit_turns": 2},
        "data": {
            "prompts": "parti", "prompt_count": 8,
            "height": size, "width": size, "samples_per_file": 8, "cache": str(out / "cache"),
        },
        "student": {
            "weights": "lora", "rank": 64 if gpu else 8,
            "backbone_dtype": "bfloat16" if gpu else "int8",
        },
        "losses": {"warmup_turns": 0},
        "critic": {"layers": sorted(set(layers)), "width": 8 if small else 256},
        "training": {
            "turns": 2 if gpu else 1, "batch_size": 8 if gpu else 1, "micro_batch": 1,
            "checkpoint_activations": True, "critic_warmup_turns": 0, "log_every": 1,
            "validate_every": 1, "validation_samples": 8, "sample_every": 1, "sample_prompts": 2,
            "save_every": 1, "device": device,
        },
        "output": str(out / "runs"),
    }  # fmt: skip


@dataclass
class Rehearsal:
    """Commands, one after another, and what they took."""

    out: Path
    facts: dict[str, Any]
    commands: list[dict[str, Any]] = field(default_factory=list)

    def run(self, name: str, *arguments: str, until: Path | None = None) -> dict[str, Any]:
        """Runs one command to its end, or kills it once `until` holds a checkpoint."""
        log, stages = self.out / f"{name}.log", self.out / f"{name}.jsonl"
        stages.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in _KEPT_OUT} | _MALLOC
        command = [sys.executable, str(_CHILD), str(stages), *arguments]
        started = time.monotonic()
        told = self.out / f"{name}.err"
        with log.open("w") as file, told.open("w") as errors:
            child = subprocess.Popen(command, stdout=file, stderr=errors, env=environment)
        killed = False
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if until is not None and not killed and any(until.glob("[ft]*-*/state.json")):
                os.kill(child.pid, signal.SIGKILL)
                killed = True
            time.sleep(0.05)
        child.returncode = os.waitstatus_to_exitcode(status)
        found: dict[str, Any] = {
            "name": name,
            "command": shlex.join(["twostep", *arguments]),
            "exit": child.returncode,
            "killed": killed,
            "seconds": time.monotonic() - started,
            "max_rss_bytes": usage.ru_maxrss * 1024,
            "stages": [json.loads(line) for line in stages.read_text().splitlines()]
            if stages.exists()
            else [],
        }
        self.commands.append(found)
        self.write()
        print(f"{name}: exit {found['exit']}, {found['seconds']:.0f} s", flush=True)
        if child.returncode and not killed:
            raise SystemExit(f"{found['command']} failed: {told.read_text()[-2000:]}")
        return found

    def write(self, **more: Any) -> None:
        """What is known so far."""
        self.facts |= more
        write_json(self.out / "rehearsal.json", self.facts | {"commands": self.commands})


def compare(plan: dict[str, Any], commands: list[dict[str, Any]], device: str) -> list[dict]:
    """By stage, what the plan says and what was measured: bytes, and the best time of a call.

    On a CPU the plan is that of device and host together with the interpreter's own.
    """
    planned = {}
    for stage in plan["stages"]:
        on_cpu = stage["host"] + plan["reserved"] if device == "cpu" else 0
        planned[stage["name"]] = stage["device"] + on_cpu
    rows: dict[str, dict[str, Any]] = {}
    for command in commands:
        for stage in command["stages"]:
            name = stage["name"]
            if name not in planned:  # a timing, or what the plan leaves out
                continue
            row = rows.setdefault(
                name, {"name": name, "planned": planned[name], "measured": 0, "seconds": 0.0}
            )
            row["measured"] = max(row["measured"], stage["peak_bytes"])
            row["seconds"] = min(row["seconds"] or stage["seconds"], stage["seconds"])
    rate = _matrix_rate(commands)
    for name, row in rows.items():
        row["ratio"] = row["measured"] / row["planned"]
        turn = name.removesuffix(" turn").replace("score fit", "score")
        if rate is not None and turn in plan["flops"]:
            row["share_of_matrix_rate"] = plan["flops"][turn] / row["seconds"] / rate
    return list(rows.values())


def _matrix_rate(commands: list[dict[str, Any]]) -> float | None:
    stages = [stage for command in commands for stage in command["stages"]]
    return next((s["operations_per_second"] for s in stages if s["name"] == "matrix rate"), None)


def main(
    scale: Annotated[str, typer.Option(help="real or small")] = "real",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    layers: Annotated[
        int | None, typer.Option(help="of the transformer, fewer than it has")
    ] = None,
    text_layers: Annotated[int | None, typer.Option(help="of the text encoder")] = None,
    prompts: Annotated[int, typer.Option(help="that the teacher paints")] = 8,
    teacher_steps: Annotated[int, typer.Option(help="fewer for a slow CPU")] = 8,
    timing: Annotated[
        bool, typer.Option(help="also rates, 8 against 2 steps, int8, the largest batch: for a GPU")
    ] = False,
    keep: Annotated[bool, typer.Option(help="leave the folder of weights there")] = False,
    out: Annotated[Path, typer.Option(help="for weights, runs and results")] = Path(
        "/tmp/twostep-rehearsal"
    ),
) -> None:
    """Rehearses and writes OUT/rehearsal.json."""
    if scale not in ("real", "small") or device not in ("cpu", "cuda"):
        raise SystemExit("--scale is real or small, --device is cpu or cuda")
    small = scale == "small"
    out.mkdir(parents=True, exist_ok=True)
    model = out / "model"
    started = time.monotonic()
    depth = write_random_folder(model, small=small, layers=layers, text_layers=text_layers)
    facts = {
        "command": shlex.join(["python", "benchmarks/rehearsal.py", *sys.argv[1:]]),
        **stamp(),
        "scale": scale,
        "device": device,
        "layers": depth,
        "folder_seconds": time.monotonic() - started,
        "folder_bytes": sum(f.stat().st_size for f in model.rglob("*") if f.is_file()),
    }
    recipe = out / "recipe.yaml"
    settings = recipe_for(
        "small" if small else "real", device=device, depth=depth, model=model, out=out
    )
    settings["data"]["prompt_count"], settings["teacher"]["steps"] = prompts, teacher_steps
    recipe.write_text(yaml.safe_dump(settings))
    rehearsal = Rehearsal(out, facts)
    size = str(settings["data"]["height"])
    run = out / "runs" / "rehearsal"
    # The last measurement of a caption's length is the tokenizer's, which is small here.
    rehearsal.run("teach", "teach", str(recipe))
    tokens = _longest_caption(out / "cache")
    rehearsal.run("plan", "plan", str(recipe), "--json", "--prompt-tokens", str(tokens))
    plan = json.loads((out / "plan.log").read_text())
    rehearsal.write(plan=plan)
    rehearsal.run("distill-killed", "distill", str(recipe), until=run / "checkpoints")
    rehearsal.run("distill", "distill", str(recipe))
    student = str(run / "student")
    rehearsal.run(
        "export-comfyui", "export", "--model", student, "--to", "comfyui",
        "--out", str(out / "comfy"),
    )  # fmt: skip
    rehearsal.run(
        "export-lora", "export", "--model", student, "--to", "lora", "--out", str(out / "lora")
    )
    rehearsal.run(
        "generate-int8", "generate", "--model", student, "--memory", "int8", "--size", size,
        "--device", device, "--out", str(out / "pictures"), "a red fox in the snow",
    )  # fmt: skip
    if timing:
        rehearsal.run("timing", "--time", str(model), student, size, device)
    rows = compare(plan, rehearsal.commands, device)
    rehearsal.write(stages=rows, seconds=time.monotonic() - started)
    for row in rows:
        print(
            f"{row['name']:18} planned {row['planned'] / 2**30:6.2f} GiB, measured "
            f"{row['measured'] / 2**30:6.2f} ({row['ratio']:.2f}), {row['seconds']:.1f} s"
        )
    if not keep:
        for folder in ("model", "cache", "runs", "comfy", "lora", "pictures"):
            shutil.rmtree(out / folder, ignore_errors=True)


def _longest_caption(cache: Path) -> int:
    from safetensors import safe_open

    longest = 1
    for path in cache.glob("shard-*.safetensors"):
        with safe_open(path, "pt") as file:
            longest = max(longest, int(file.get_tensor("offsets").diff().max()))
    return longest


if __name__ == "__main__":
    typer.run(main)
