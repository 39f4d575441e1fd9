"""The commands of docs/z-image.md, word for word, on a small model of the same kind."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostep.cli import app
from twostep.inference.pipeline import TwoStepPipeline

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "z-image.md").read_text(encoding="utf-8")
SMALL = [
    "data.prompt_count=8", "data.samples_per_prompt=1", "data.height=32", "data.width=32",
    "data.other_sizes=[[32, 64]]", "critic.layers=[0, 1]", "critic.width=8",
    "training.batch_size=4", "training.turns=3", "score.fit_turns=2",
    "training.critic_warmup_turns=1", "training.validation_samples=4", "training.device=cpu",
]  # fmt: skip


def commands(block: int) -> list[list[str]]:
    text = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.S)[block]
    lines = text.replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def run(command: list[str], teacher: Path) -> str:
    """As it stands there, but for the model, its size and the number of processes."""
    swaps = {"Tongyi-MAI/Z-Image-Turbo": str(teacher), "1024": "32", "8": "2"}
    command = [swaps.get(word, word) for word in command]
    if "--decoder" in command:  # a model of the hub, for other latents
        index = command.index("--decoder")
        del command[index : index + 2]
    if any(word.startswith("zoo:z-image") for word in command):
        command += [*SMALL, f"teacher.model={teacher}"]
    elif "evaluate" in command:
        command += ["--images", "8"]
    if command[0] == "twostep":
        done = CliRunner().invoke(app, command[1:])
        assert done.exit_code == 0, (command, done.output, done.exception)
        return done.output
    launch = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (command, result.stderr)
    return result.stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held-out.txt").write_text("".join(f"a thing, {n} of many\n" for n in range(8)))
    return tmp_path


@pytest.mark.slow
def test_lora_from_plan_to_picture(tiny_folder: Path, folder: Path) -> None:
    setup, *steps = commands(0)
    assert setup[:2] == ["pip", "install"]
    names = ["plan", "teach", "distill", "evaluate", "generate", "export", "export"]
    assert [command[1] for command in steps] == names
    printed = {command[1]: run(command, tiny_folder) for command in steps}
    assert "fits" in printed["plan"]
    assert (folder / "runs" / "check" / "report.html").is_file()
    # The pair: one set of weights for both, and a LoRA for each step.
    written = sorted(path.name for path in (folder / "comfy").glob("*.safetensors"))
    assert written == ["base.safetensors", "first.safetensors", "second.safetensors"]
    pictures = [word for word in printed["generate"].split() if word.endswith(".png")]
    assert len(pictures) == 1
    assert (folder / pictures[0]).is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_full_sets_on_two_processes(tiny_folder: Path, folder: Path) -> None:
    for command in commands(1):
        assert command[0] == "torchrun"
        run(command, tiny_folder)
    student = folder / "runs" / "z-image-turbo-full" / "student"
    pipeline = TwoStepPipeline.from_pretrained(student)
    assert pipeline("a thing", height=32, width=64).images[0].size == (64, 32)
