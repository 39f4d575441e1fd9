"""What the README tells people to type is what there is."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from twostep.cli import app
from twostep.inference.sampler import Sampler
from twostep.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def test_make_targets_exist() -> None:
    targets = [c[1] for c in commands() if c[0] == "make"]
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_command_parses() -> None:
    import typer

    group = typer.main.get_command(app)
    ours = [c for c in commands() if c[0] == "twostep"]
    assert len(ours) >= 6
    for _, name, *arguments in ours:
        # Raises for an unknown option or a missing argument.
        group.commands[name].make_context(name, list(arguments))  # type: ignore[attr-defined]


def test_recipe_of_the_readme_is_valid() -> None:
    (text,) = blocks("yaml")
    recipe = Recipe.parse(yaml.safe_load(text))
    assert recipe.student.gradient == "end_to_end"
    assert str(recipe.run_folder / "student") in README


def test_python_of_the_readme_compiles() -> None:
    for block in blocks("python"):
        ast.parse(block)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tables_are_generated_from_their_json() -> None:
    command = [sys.executable, str(ROOT / "tools" / "tables.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("model", ["zoo:emoji-teacher", "zoo:emoji-student"])
def test_models_of_the_readme_make_pictures(model: str, tmp_path: Path) -> None:
    from twostep.inference.generate import PictureRequest, generate

    request = PictureRequest(model, ["two cats on a red background"])
    (picture,) = generate(request, tmp_path)
    with Image.open(picture.path) as image:
        assert image.size == (64, 64)
        red, _, _ = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
        assert red > 120
    assert Sampler.load(model).is_student == ("student" in model)
