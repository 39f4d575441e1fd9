"""What trackers are told, and what a folder of runs says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from twostep.cli import app
from twostep.distill import trackers
from twostep.distill.monitor import Monitor
from twostep.distill.run_list import list_runs
from twostep.distill.trackers import Trackers
from twostep.recipe.schema import Recipe


class Kept:
    """A tracker as accelerate has them, that keeps what it is told."""

    def __init__(self, name: str, told: list[tuple[str, object]]) -> None:
        self.name, self.told, self.main_process_only = name, told, True

    def start(self) -> None:
        assert not self.main_process_only
        self.told.append(("start", None))

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.told.append(("recipe", values))

    def log(self, values: dict[str, object], step: int | None = None) -> None:
        self.told.append((f"log {step}", values))

    def log_images(self, values: dict[str, object], step: int | None = None, **_: object) -> None:
        self.told.append((f"images {step}", values))

    def finish(self) -> None:
        self.told.append(("finish", None))


def test_trackers_get_recipe_records_and_sheets(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[tuple[str, object]]] = {"tensorboard": [], "wandb": []}
    for name, kept in told.items():
        started = {**trackers._STARTED, name: lambda *_, n=name, k=kept: Kept(n, k)}
        monkeypatch.setattr(trackers, "_STARTED", started)
    recipe = make_recipe(training={"report_to": list(told)})
    sheet = tmp_path / "turn-0000010.png"
    Image.new("RGB", (6, 4), "red").save(sheet)
    monitor = Monitor(tmp_path, resume_at=-20, trackers=Trackers(recipe, tmp_path))
    monitor.record(-10, {"score/flow_matching": 1.0})
    monitor.sheet(10, sheet)
    monitor.record(10, {"loss": 0.5})
    monitor.close()
    for name, kept in told.items():
        assert [what for what, _ in kept] == [
            "start", "recipe", "log -10" if name == "tensorboard" else "log None",
            "images 10", "log 10", "finish",
        ]  # fmt: skip
        settings, sheet_told = dict(kept)["recipe"], dict(kept)["images 10"]
        assert settings["training.turns"] == recipe.training.turns  # type: ignore[index]
        assert settings["training.report_to"] == str(list(told))  # type: ignore[index]
        (pictures,) = sheet_told.values()  # type: ignore[attr-defined]
        assert np.asarray(pictures[0])[0, 0].tolist() == [255, 0, 0]
        assert dict(kept)["log 10"] == {"loss": 0.5}


def test_tensorboard_writes_files(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sheet = tmp_path / "sheet.png"
    Image.new("RGB", (6, 4), "red").save(sheet)
    reported = Trackers(make_recipe(training={"report_to": ["tensorboard"]}), tmp_path)
    reported.log(10, {"loss": 0.5})
    reported.sheet(10, sheet)
    reported.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(10, 0.5)]
    (picture,) = found.Images("samples")
    assert (picture.step, picture.width, picture.height) == (10, 6, 4)


def test_runs_say_how_far_they_came_and_how_they_ended(tmp_path: Path) -> None:
    recipe = "name: x\nteacher: {model: 'zoo:emoji-teacher'}\ntraining: {turns: 200}\n"
    records = [
        {"turn": -10, "score/flow_matching": 1.0},
        {"turn": 50, "loss": 1.0, "validation/kernel_distance": 0.5},
        {"turn": 100, "loss": 0.9, "validation/kernel_distance": 0.25},
        {"turn": 150, "loss": 0.9, "validation/kernel_distance": 0.75},
    ]
    outcomes = {
        "a": {"turns": 200, "diverged": []},
        "b": {"turns": 200, "diverged": ["x"]},
        "c": None,
    }
    for name, outcome in outcomes.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(recipe)
        (folder / "run.json").write_text(
            json.dumps({} if outcome is None else {"outcome": outcome})
        )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "no run").mkdir()
    (tmp_path / "a" / "student").mkdir()
    runs = list(list_runs(tmp_path))
    assert [(Path(r.folder).name, r.state) for r in runs] == [
        ("a", "finished"), ("b", "diverged"), ("c", "stopped"),
    ]  # fmt: skip
    assert all((r.turn, r.turns, r.share) == (150, 200, 0.75) for r in runs)
    assert all((r.best_turn, r.distance) == (100, 0.25) for r in runs)
    assert (runs[0].student, runs[1].student) == (str(tmp_path / "a" / "student"), None)
    said = CliRunner().invoke(app, ["runs", str(tmp_path)]).stdout.splitlines()
    assert len(said) == 3
    assert "a: finished, turn 150 of 200 (75%)" in said[0]
    assert "best 0.25 at turn 100; teacher zoo:emoji-teacher" in said[0]
    (alone,) = list_runs(tmp_path / "b")
    assert alone.state == "diverged"
