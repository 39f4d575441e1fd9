"""Two at once, torn logs and what killed runs left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from twostep.data.cache.build import open_cache
from twostep.distill.checkpoint import CheckpointError
from twostep.distill.monitor import Monitor, read_metrics
from twostep.distill.run_folder import RunFolder
from twostep.distill.trainer import Trainer
from twostep.planning.preflight import check_here
from twostep.recipe.schema import Recipe
from twostep.runtime.files import make_folder
from twostep.runtime.locks import InUseError, locked

Make = Callable[..., Recipe]


def test_one_run_and_one_cache_at_a_time(make_recipe: Make) -> None:
    recipe = make_recipe(training={"turns": 2})
    with (
        locked(Path(recipe.data.cache), option="data.cache", purpose="another recipe"),
        pytest.raises(InUseError, match=r"^data\.cache: .* is in use by process"),
    ):
        open_cache(recipe)
    cache = open_cache(recipe)
    trainer = Trainer(recipe, cache)
    with RunFolder(recipe.run_folder).taken():
        with pytest.raises(InUseError, match=r"^output and name: .* is in use by process"):
            trainer.train()
        with pytest.raises(InUseError, match=r"^output and name: "):
            check_here(recipe)
    assert not (recipe.run_folder / "run.json").exists()
    make_folder(recipe.run_folder / "checkpoints" / "turn-0000001")  # another process was faster
    with pytest.raises(CheckpointError, match="was changed by another process"):
        trainer.train()


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in (".best.tmp", "checkpoints/.turn-0000054.tmp", "checkpoints/.fit-0000002.tmp"):
        make_folder(tmp_path / name)
        (tmp_path / name / "state.json").touch()
    for name in ("checkpoints/turn-0000050", "notes.tmp", ".mine.tmp"):
        make_folder(tmp_path / name)
    with run.taken():
        found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    assert found == {
        "checkpoints", "checkpoints/turn-0000050", "notes.tmp", ".mine.tmp", ".lock",
        ".lock-holder.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    "torn", ['{"turn": 3, "lo', "\0\0\0\0", "[]", '{"loss": 1}', "\ud800", '{"turn": "x"}']
)
def test_a_torn_log_is_no_reason_to_stop(torn: str, tmp_path: Path) -> None:
    lines = b'{"turn": 1, "loss": 2.0}\n' + torn.encode("utf-8", "surrogatepass")
    (tmp_path / "metrics.jsonl").write_bytes(lines + b'\n{"turn": 2, "loss": 1.0}\n{"turn": 9}\n')
    assert [r["turn"] for r in read_metrics(tmp_path)] == [1, 2, 9]
    monitor = Monitor(tmp_path, resume_at=2)
    monitor.record(3, {"loss": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"turn": 1, "loss": 2.0}\n{"turn": 2, "loss": 1.0}\n{"turn": 3, "loss": 0.5}\n'
