"""The study's rows are the ones that the ablation claims to compare."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from twostep.config import Recipe

FOLDER = Path(__file__).parents[1] / "studies" / "ablation"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    specification = importlib.util.spec_from_file_location("ablation_run", FOLDER / "run.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    sys.path.remove(str(FOLDER))
    return module


def recipe(study: ModuleType, name: str, common: tuple[str, ...] = ()) -> Recipe:
    row = study.ROWS[name]
    return study.recipe_of(row, name, 1, Path("out"), common, Path("out/rendered"))


@pytest.mark.parametrize(
    ("name", "reals", "parameters", "gradient", "step1", "adversarial"),
    [
        ("dmd", "teacher", "shared", "cut", 0.5, False),
        ("dmd2_like", "out/rendered", "shared", "cut", 0.5, True),
        ("teacher_images", "teacher", "shared", "cut", 0.5, True),
        ("decoupled", "teacher", "decoupled", "cut", 0.5, True),
        ("end_to_end", "teacher", "decoupled", "end_to_end", 0.0, True),
        ("full", "teacher", "decoupled", "end_to_end", 0.5, True),
    ],
)
def test_ladder(
    study: ModuleType,
    name: str,
    reals: str,
    parameters: str,
    gradient: str,
    step1: float,
    adversarial: bool,
) -> None:
    found = recipe(study, name)
    assert found.data.reals == reals
    assert found.student.parameters == parameters
    assert found.student.gradient == gradient
    assert found.losses.step1.weight == step1
    assert found.uses_critic == adversarial


def test_rows_share_cache_budget_and_seed_and_differ_from_the_full_method(
    study: ModuleType,
) -> None:
    full = recipe(study, "full").model_dump()
    for name in study.ROWS:
        for common in ((), study.QUICK):
            found = recipe(study, name, common)
            assert str(found.data.cache) == "out/cache"
            assert found.training.seed == 1
            assert found.name == f"{name}-1"
            assert found.training.turns == recipe(study, "full", common).training.turns
        other = recipe(study, name).model_dump() | {"name": full["name"]}
        assert (other == full) == (name == "full"), name


def test_removals_take_away_one_idea_each(study: ModuleType) -> None:
    full = recipe(study, "full")
    without = {n: recipe(study, n) for n, row in study.ROWS.items() if row.group == "removal"}
    assert without["cut"].student.gradient == "cut"
    assert without["shared"].student.parameters == "shared"
    assert not without["no_critic"].uses_critic
    assert without["no_matching"].losses.final.distribution_matching == 0
    assert without["external"].data.reals != full.data.reals
    for name, found in without.items():
        same = {"data", "student", "losses"} - {
            "external": {"data"}, "shared": {"student"}, "cut": {"student"},
        }.get(name, {"losses"})  # fmt: skip
        for section in same:
            ours, theirs = getattr(found, section), getattr(full, section)
            assert ours == theirs, (name, section)


def test_turns_to_arrive(study: ModuleType) -> None:
    def records(*distances: float) -> list[dict[str, float]]:
        return [
            {"turn": 10 * (i + 1), "validation/kernel_distance": d} for i, d in enumerate(distances)
        ]

    assert study.turns_to_arrive(records(1, 0.05, 0.5, 0.05, 0.01)) == 40
    assert study.turns_to_arrive(records(1, 0.5)) is None
    assert study.turns_to_arrive([{"turn": 5}]) is None
