from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from twostep.cli import app
from twostep.errors import InputError, RecipeError
from twostep.recipe.rules import MAY_CHANGE, differences
from twostep.recipe.schema import Recipe
from twostep.zoo import recipe_names, recipe_path

MINIMAL = {"name": "x", "teacher": {"model": "zoo:emoji-teacher"}}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nteacher:\n  model: zoo:emoji-teacher\n")
    return path


def test_overrides_reach_nested_keys(recipe_file: Path) -> None:
    recipe = Recipe.load(
        recipe_file,
        [
            "training.turns=300",
            "training.learning_rate=1e-5",
            "losses.final.adversarial=0",
            "losses.step1.adversarial=0",
            "critic.layers=[1, 3]",
        ],
    )
    assert recipe.training.turns == 300
    assert recipe.training.learning_rate == 1e-5
    assert recipe.losses.final.adversarial == 0
    # What a section does not name keeps its default.
    assert recipe.losses.step1.weight == 0.5
    assert recipe.critic.layers == (1, 3)
    assert not recipe.uses_critic


def test_resolved_recipe_reads_back_as_itself(recipe_file: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(recipe_file, ["training.minutes=3", "data.cache=somewhere"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert Recipe.load(again) == recipe


@pytest.mark.parametrize(
    "path", [recipe_path(f"zoo:{name}") for name in recipe_names()], ids=lambda p: p.stem
)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert Recipe.load(path).name == path.stem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainning": {}}, "trainning: unknown key; did you mean 'training'"),
        (
            {"training": {"learning_rat": 1}},
            "training.learning_rat: unknown key; did you mean 'learning_rate'",
        ),
        (
            {"losses": {"final": {"adverserial": 1}}},
            "losses.final.adverserial: unknown key; did you mean 'adversarial'",
        ),
        ({"training": {"turns": 0}}, "training.turns: .*greater than or equal to 1, got 0"),
        (
            {"student": {"gradient": "both"}},
            "student.gradient: .*'end_to_end' or 'cut'.*got 'both'",
        ),
        ({"losses": {"tau_range": [0.9, 0.1]}}, "losses: tau_range must ascend"),
        ({"losses": {"final": {"guidance_augmentation": 1.0}}}, "needs score.model"),
        ({"losses": {"consistency": 1.0}}, "consistency needs student.steps: shared"),
        (
            {"training": {"turns": 10}, "losses": {"warmup_turns": 200}},
            r"warmup_turns \(200\) exceeds",
        ),
        ({"name": "../escape"}, "name: "),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
    ],
)
def test_mistakes_are_named(changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({**MINIMAL, **changes})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.turns", "expected key=value"),
        ("name.x=1", "name is not a section"),
        ("training.turns=[1", "not valid YAML"),
        ("training.turns=many", "training.turns: .*got 'many'"),
    ],
)
def test_bad_overrides_are_named(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(recipe_file, [override])


def test_missing_file_and_wrong_content(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        Recipe.load(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="must hold a mapping, found list"):
        Recipe.load(path)


def leaves(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= leaves(inner, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field
    return found


def test_every_leaf_has_a_description() -> None:
    found = leaves(Recipe)
    assert len(found) > 80
    assert [key for key, field in found.items() if not field.description] == []
    assert [key for key, field in found.items() if (field.description or "").endswith(".")] == []


def test_keys_that_may_change_exist() -> None:
    assert set(leaves(Recipe)) >= MAY_CHANGE


def test_differences_name_what_a_continuation_may_not_change() -> None:
    begun = Recipe.parse(MINIMAL)
    longer = {"training": {"turns": 5000, "device": "cpu"}, "distributed": {"sharding": "shard"}}
    assert differences(begun, Recipe.parse({**MINIMAL, **longer})) == []
    other = {"training": {"turns": 5000, "batch_size": 8}, "data": {"height": 32}}
    assert differences(begun, Recipe.parse({**MINIMAL, **other})) == [
        "data.height was 64, is 32",
        "training.batch_size was 24, is 8",
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"student": {"parameters": "lora"}}, "student.parameters: is now student.weights: lora"),
        ({"student": {"parameters": "shared"}}, "student.parameters: is now student.steps: shared"),
        ({"student": {"parameters": 3}}, "student.steps (decoupled or shared) and student.weights"),
        ({"data": {"shard_size": 8}}, "data.shard_size: is now data.samples_per_file"),
    ],
)
def test_keys_of_earlier_versions_say_what_to_write_now(
    make_recipe: Callable[..., Recipe], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        make_recipe(**sections)


def test_recipes_of_the_package_are_named_like_models(tmp_path: Path) -> None:
    recipe = Recipe.load("zoo:emoji-demo", ["training.turns=7", "losses.warmup_turns=1"])
    assert (recipe.name, recipe.training.turns) == ("emoji-demo", 7)
    with pytest.raises(RecipeError, match="no recipe 'zoo:none' in the package"):
        Recipe.load("zoo:none")


def test_a_recipe_is_copied_once(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    arguments = ["recipes", "--copy", "zoo:emoji-demo", "--to", str(target)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert Recipe.load(target) == Recipe.load("zoo:emoji-demo")
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, InputError)
    assert "exists, expected the path of a new file" in str(again.exception)
    listed = CliRunner().invoke(app, ["recipes"]).output
    assert [line.split()[0] for line in listed.splitlines() if "zoo:" in line] == [
        f"zoo:{name}" for name in recipe_names()
    ]
