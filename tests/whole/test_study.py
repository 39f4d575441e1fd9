"""The study's rows are the ones that the ablation claims to compare."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from twostep.data.cache.build import open_cache
from twostep.recipe.schema import Recipe

FOLDER = Path(__file__).parents[2] / "studies" / "ablation"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        f"ablation_{name}", FOLDER / f"{name}.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield load("run")
    sys.path.remove(str(FOLDER))


def recipe(study: ModuleType, name: str, common: tuple[str, ...] = ()) -> Recipe:
    row = study.ROWS[name]
    return study.recipe_of(
        row, name, seed=1, out=Path("out"), common=common, external=Path("out/rendered")
    )


@pytest.mark.parametrize(
    ("name", "reals", "steps", "gradient", "step1", "adversarial", "fitted"),
    [
        ("dmd", "teacher", "shared", "cut", 0.5, False, False),
        ("dmd2_like", "out/rendered", "shared", "cut", 0.5, True, False),
        ("teacher_images", "teacher", "shared", "cut", 0.5, True, False),
        ("decoupled", "teacher", "decoupled", "cut", 0.5, True, False),
        ("end_to_end", "teacher", "decoupled", "end_to_end", 0.0, True, False),
        ("paper", "teacher", "decoupled", "end_to_end", 0.5, True, False),
        ("full", "teacher", "decoupled", "end_to_end", 0.5, True, True),
    ],
)
def test_ladder(
    study: ModuleType,
    name: str,
    reals: str,
    steps: str,
    gradient: str,
    step1: float,
    adversarial: bool,
    fitted: bool,
) -> None:
    assert list(study.TABLES["ladder"])[-1] == "full"
    assert name in study.TABLES["ladder"]
    found = recipe(study, name)
    assert found.data.reals == reals
    assert found.student.steps == steps
    assert found.student.gradient == gradient
    assert found.losses.step1.weight == step1
    assert found.uses_critic == adversarial
    assert (found.score.model == "out/runs/fitted/score") == fitted


def test_every_row_stands_in_a_table_and_the_reverse(study: ModuleType) -> None:
    assert {name for table in study.TABLES.values() for name in table} == set(study.ROWS)


def test_rows_share_cache_seed_and_start_and_differ_from_the_full_method(
    study: ModuleType,
) -> None:
    full = recipe(study, "full").model_dump()
    for name, row in study.ROWS.items():
        for common in ((), study.QUICK):
            found = recipe(study, name, common)
            assert str(found.data.cache) == "out/cache"
            assert found.training.seed == 1
            assert found.name == f"{name}-1"
            budget = recipe(study, "full", common).training.turns
            assert found.training.turns == max(1, round(budget * row.turns))
            assert found.losses.warmup_turns == (found.training.turns if row.regression else 0)
            assert found.student.init is None
            made = {f"out/runs/{fit}/score": fit for fit in study.FITS}
            assert made.get(found.score.model) == row.score
            if row.score:
                fit = study.recipe_of_fit(row.score, 20, out=Path("out"), common=common)
                assert fit.run_folder / "score" == Path(f"out/runs/{row.score}/score")
                assert fit.score.fit_turns == 20
                assert fit.data.cache == found.data.cache
        other = recipe(study, name).model_dump() | {"name": full["name"]}
        assert (other == full) == (name == "full"), name


def test_ladder_and_removals_have_equal_turns(study: ModuleType) -> None:
    for table in ("ladder", "removal"):
        assert {study.ROWS[name].turns for name in study.TABLES[table]} == {1.0}


def test_removals_take_away_one_idea_each(study: ModuleType) -> None:
    full = recipe(study, "full")
    without = {n: recipe(study, n) for n in study.TABLES["removal"] if n != "full"}
    assert without["cut"].student.gradient == "cut"
    assert without["shared"].student.steps == "shared"
    assert not without["no_critic"].uses_critic
    assert without["no_matching"].losses.final.distribution_matching == 0
    assert without["external"].data.reals != full.data.reals
    assert without["paper"].score.model is None
    for name, found in without.items():
        same = {"data", "student", "losses", "score"} - {
            "external": {"data"}, "shared": {"student"}, "cut": {"student"},
            "paper": {"score"},
        }.get(name, {"losses"})  # fmt: skip
        for section in same:
            ours, theirs = getattr(found, section), getattr(full, section)
            assert ours == theirs, (name, section)


def test_turns_to_reach(study: ModuleType) -> None:
    def curve(*distances: float) -> list[dict[str, float]]:
        return [{"turn": 10 * (i + 1), "distance": d} for i, d in enumerate(distances)]

    assert study.turns_to_reach(curve(1, 0.05, 0.5, 0.05, 0.01), 0.1) == 40
    assert study.turns_to_reach(curve(1, 0.1), 0.1) == 20
    assert study.turns_to_reach(curve(1, 0.5), 0.1) is None
    assert study.turns_to_reach([], 0.1) is None


def test_a_run_counts_the_networks_evaluations(
    make_recipe: Callable[..., Recipe],
) -> None:
    """Per image: 2 calls with gradient in a warm-up turn; 16 in a student's, 14 in a critic's."""
    one_run = load("one_run")
    recipe = make_recipe(training={"validate_every": 100, "sample_every": 100})
    open_cache(recipe)
    one_run.run(recipe, 1)
    done = json.loads((recipe.run_folder / "done.json").read_text())
    settings, warm = recipe.training, recipe.losses.warmup_turns
    turns = settings.turns - warm
    per_image = warm * 2 * 3 + turns * (2 * 3 + 4 + 2 * 3) + (turns + 1) * (2 + 2 + 2 * 3 + 2 * 2)
    assert done["evaluations"] == settings.batch_size * per_image
