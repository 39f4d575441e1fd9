from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from twostep.cli import app, main
from twostep.cli.export import Format
from twostep.errors import UserError
from twostep.exports.registry import FORMATS
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


def test_choices_are_those_of_the_rooms() -> None:
    assert set(get_args(Format)) == set(FORMATS)
    shown = CliRunner().invoke(app, ["export", "-h"], env={"COLUMNS": "200"}).stdout
    assert all(name in shown for name in get_args(Format))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["generate", "x", "--model", "emoji-student"], "did you mean zoo:emoji-student?"),
        (["plan", "emoji-demo"], "did you mean zoo:emoji-demo?"),
        (["generate", "x", "--model", "RUN"], "did you mean RUN/student?"),
    ],
)
def test_names_that_are_nearly_right(
    arguments: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN" / "student").mkdir(parents=True)
    (tmp_path / "RUN" / "student" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape(hint)):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_a_terminal_without_utf8_and_a_prompt_in_chinese(tmp_path: Path) -> None:
    where = tmp_path / "狗"
    where.mkdir()
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    ran = subprocess.run(
        [sys.executable, "-m", "twostep", "runs", str(where)],
        capture_output=True,
        env=environment,
        check=True,
    )
    assert ran.stderr.decode("utf-8").strip() == f"no runs in {where}"  # a path, byte for byte
    ran = subprocess.run(
        [sys.executable, "-m", "twostep", "generate", "--model", "zoo:none", "狗"],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert (ran.returncode, ran.stderr[:8]) == (2, b"twostep:")
