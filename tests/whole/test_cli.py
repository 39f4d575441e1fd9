from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostep.cli import app, main
from twostep.recipe.schema import Recipe

runner = CliRunner()
EVALUATE = ["evaluate", "--reference", "zoo:emoji-teacher", "--out", "nowhere"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "twostep", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    "command",
    [
        "teach",
        "distill",
        "generate",
        "compare",
        "evaluate",
        "export",
        "assemble",
        "average",
        "demo",
    ],
)
def test_help_has_an_example(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"twostep {command}" in result.output


def test_dry_run_prints_the_resolved_recipe(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(make_recipe().to_yaml())
    result = runner.invoke(app, ["distill", str(path), "training.turns=77", "--dry-run"])
    assert result.exit_code == 0
    (tmp_path / "again.yaml").write_text(result.stdout)
    assert Recipe.load(tmp_path / "again.yaml").training.turns == 77
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["generate", "a dog", "--model", "zoo:none"], "no model 'zoo:none' in the package"),
        (["generate", "a dog", "--model", "./none"], "no model folder at './none'"),
        (
            ["generate", "a dog", "--model", "zoo:emoji-teacher", "--size", "33"],
            "multiple of 8, got 33",
        ),
        (
            ["generate", "--model", "zoo:emoji-student", "--prompts", "none.txt"],
            "--prompts: no file at none.txt",
        ),
        (
            [*EVALUATE, "--model", "zoo:emoji-student", "--prompts", "none.txt"],
            "--prompts: no file at none.txt",
        ),
        ([*EVALUATE, "--model", "zoo:emoji-student", "--device", "tpu"], "--device: expected auto"),
        (
            ["generate", "a dog", "--model", "zoo:emoji-student", "--device", "cuda:99"],
            "--device: cuda:99 was asked for, but torch sees no such device",
        ),
        (
            ["compare", "zoo:emoji-student", "--prompt", "a dog", "--device", "gpu"],
            "--device: expected auto, cpu, cuda, cuda:NUMBER or mps, got 'gpu'",
        ),
    ],
)
def test_mistakes_end_in_one_message(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["twostep", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("twostep: ")
    assert message in errors


def test_a_mistake_in_a_recipe_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nteacher:\n  model: zoo:emoji-teacher\n  step: 8\n")
    result = run("distill", str(path))
    assert result.returncode == 2
    assert result.stderr.strip() == "twostep: teacher.step: unknown key; did you mean 'steps'?"
