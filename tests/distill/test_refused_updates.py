"""A run whose numbers are not finite is never a success."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from twostep.data.cache.build import open_cache
from twostep.distill.checkpoint import CheckpointError, Progress
from twostep.distill.run_folder import RunFolder
from twostep.distill.trainer import Trainer
from twostep.distill.update import TrainingStopped, note_finite
from twostep.errors import RecipeError
from twostep.recipe.schema import Recipe

Make = Callable[..., Recipe]


def test_each_kind_of_update_has_a_counter_of_its_own() -> None:
    progress = Progress()
    for _ in range(2):  # the critic's success says nothing of the student's failure
        note_finite(progress, "student", accepted=False, limit=2)
        note_finite(progress, "critic", accepted=True, limit=2)
    assert progress.skipped == {"student": 2}
    with pytest.raises(TrainingStopped, match="student: loss or gradient was not finite 3 times"):
        note_finite(progress, "student", accepted=False, limit=2)
    note_finite(progress, "student", accepted=True, limit=2)
    assert (progress.skipped, progress.skipped_in_a_row) == ({"student": 3}, {})
    with pytest.raises(TrainingStopped, match=r"lower score\.learning_rate"):
        note_finite(progress, "score", accepted=False, limit=0)
    assert TrainingStopped.exit_code == 1


@pytest.mark.parametrize(
    ("saved", "restored"), [(0, {}), (3, {"student": 3}), ({"score": 1}, {"score": 1})]
)
def test_a_checkpoint_with_one_counter_is_read(saved: object, restored: dict[str, int]) -> None:
    progress = Progress()
    progress.restore({"turn": 5, "skipped": saved, "skipped_in_a_row": saved})
    assert (progress.turn, progress.skipped, progress.skipped_in_a_row) == (5, restored, restored)


def test_a_run_whose_every_student_turn_was_refused_makes_no_student(make_recipe: Make) -> None:
    recipe = make_recipe(
        losses={"warmup_turns": 0, "final": {"weight": 1e38}},
        training={"turns": 3, "validate_every": 3, "log_every": 1},
    )
    cache = open_cache(recipe)
    with pytest.raises(TrainingStopped, match="each of the 3 student turns was refused"):
        Trainer(recipe, cache).train()
    run = RunFolder(recipe.run_folder)
    assert not run.student.exists()
    assert run.metrics()[-1]["skipped/student"] == 3
    checkpoint = run.last_checkpoint()
    assert checkpoint is not None
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["progress"]["skipped"] == {"student": 3}
    assert state["facts"]["recipe"]["losses"]["final"]["weight"] == 1e38
    _moved_and_changed_runs(recipe, run, cache.spec.fingerprint)


def _moved_and_changed_runs(recipe: Recipe, run: RunFolder, data: str) -> None:
    """The same folder under another path is the same run; other settings or data are not."""
    values = recipe.model_dump(mode="json")
    moved = Recipe.parse(values | {"output": f"{recipe.output}/../runs"})
    run.check_same_recipe(moved, data)
    teacher = values["teacher"] | {"model": f"{recipe.teacher.model}/../tiny-teacher"}
    run.check_same_recipe(Recipe.parse(values | {"teacher": teacher}), data)
    run.recipe.unlink()  # the checkpoint knows
    for other, found in (
        (values | {"training": values["training"] | {"learning_rate": 3e-4}}, data),
        (values, "other data"),
    ):
        with pytest.raises(RecipeError, match="holds a run of another recipe") as error:
            run.check_same_recipe(Recipe.parse(other), found)
        assert "remove" not in str(error.value)
    checkpoint = run.last_checkpoint()
    assert checkpoint is not None
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        run.check_same_recipe(recipe, data)


def test_validations_that_are_not_finite_count(make_recipe: Make) -> None:
    recipe = make_recipe(training={"turns": 2, "validate_every": 1, "max_non_finite": 1})
    trainer = Trainer(recipe, open_cache(recipe))
    for value in trainer.state.ema.values:
        value.fill_(math.nan)
    trainer.state.ema.update = lambda: None  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped, match="validation: its images were not finite 2 times"):
        trainer.train()
    assert not RunFolder(recipe.run_folder).best.exists()


def test_a_folder_that_is_no_run_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "report.json").write_text("{}")
    for content in ("{}", "[]", '{"versions": {}}', "{"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(RecipeError, match="nothing in it is removed"):
            RunFolder(tmp_path).clear()
    assert (tmp_path / "images").is_dir()
