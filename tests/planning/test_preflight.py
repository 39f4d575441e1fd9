"""What cannot run is refused in seconds, before any network is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from twostep.cli import app
from twostep.distill.objectives.build import build_roles
from twostep.errors import UserError
from twostep.families.zimage import ZImage
from twostep.models.folder import ModelFolder
from twostep.planning import first_look, memory, places, preflight
from twostep.planning.preflight import check_here, check_plan
from twostep.planning.weightless import load_weightless
from twostep.recipe.schema import Recipe

Make = Callable[..., Recipe]

# Sections of a recipe that is accepted as such, and what is said of it. HERE is a folder of the test.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": ({"teacher": {"model": "/does/not/exist"}}, "no model folder at"),
    "a student": ({"teacher": {"model": "zoo:emoji-student"}}, r"^teacher\.model: .* two-step student"),
    "size": ({"data": {"height": 63}}, r"^data\.height, width or other_sizes: height must"),
    "other size": ({"data": {"other_sizes": [[32, 63]]}}, "width must be a positive multiple"),
    "no layer 99": ({"critic": {"layers": [99]}}, r"^critic\.layers: expected ascending"),
    "no layers": ({"critic": {"layers": []}}, r"^critic\.layers: expected"),
    "layer twice": ({"critic": {"layers": [1, 1]}}, r"^critic\.layers: expected"),
    "no init": ({"student": {"init": "/none"}}, "no model folder at '/none'"),
    "init no student": ({"student": {"init": "zoo:emoji-teacher"}}, r"^student\.init: .* no two-step"),
    "no score": ({"score": {"model": "/none"}}, "no model folder at '/none'"),
    "score a student": ({"score": {"model": "zoo:emoji-student"}}, r"^score\.model: .* student"),
    "no reals": ({"data": {"reals": "/none"}}, r"^data\.reals: no images in '/none', which is no folder"),
    "empty reals": ({"data": {"reals": "HERE/empty"}}, r"^data\.reals: no images"),
    "broken real": ({"data": {"reals": "HERE/reals"}}, "broken.png cannot be read as an image"),
    "no module": (
        {"student": {"weights": "lora", "target_modules": "nothing"}},
        r"^student\.target_modules: no linear layer matches 'nothing'",
    ),
    "no expression": (
        {"student": {"weights": "lora", "target_modules": "["}},
        r"^student\.target_modules: '\[' is no regular expression",
    ),
    "rank": ({"student": {"weights": "lora", "rank": 65}}, r"^student\.rank: must be at most 64"),
    "off the grid": (
        {"step2_sigma": 0.61, "losses": {"warmup_step1_target": "trajectory"}},
        "trajectory needs step2_sigma on the teacher's grid",
    ),
    "micro batch": ({"training": {"micro_batch": 3}}, r"^training\.micro_batch: 3 does not divide"),
    "report_to": ({"training": {"report_to": ["wandb"]}}, r"^training\.report_to: wandb .* not installed"),
    "scorer": (
        {"training": {"validation_scores": ["x=nosuchcommand"]}},
        r"^training\.validation_scores: x: no program 'nosuchcommand'",
    ),
    "inspector": ({"training": {"validation_scores": ["inspector"]}}, "judges only prompts"),
    "output a file": ({"output": "HERE/file"}, r"^output and name: .*file is a file"),
    "cache a file": ({"data": {"cache": "HERE/file/c"}}, r"^data\.cache: .*file is a file"),
    "long name": ({"name": "n" * 300}, r"^output and name: a name of more than 255 bytes"),
    "cache in the student": (
        {"data": {"cache": "HERE/runs/tiny/student"}, "output": "HERE/runs"},
        "lie within each other",
    ),
    "teacher is the run's student": (
        {"teacher": {"model": "HERE/runs/tiny/student"}, "output": "HERE/runs"},
        "lie within each other",
    ),
    "no prompts": ({"data": {"prompts": "HERE/none.txt"}}, r"^data\.prompts: no file at"),
    "another cache": ({"data": {"cache": "HERE/other"}}, "was made with another teacher"),
}  # fmt: skip


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "reals").mkdir()
    (tmp_path / "reals" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({"fingerprint": "0"}))
    shutil.copytree(tiny_folder, tmp_path / "runs" / "tiny" / "student")
    return tmp_path


def in_place(value: Any, here: Path) -> Any:
    if isinstance(value, dict):
        return {key: in_place(each, here) for key, each in value.items()}
    return value.replace("HERE", str(here)) if isinstance(value, str) else value


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ZImage, "load", lambda *_: pytest.fail("a network was loaded"))
    monkeypatch.setattr(first_look, "is_installed", lambda package: package != "wandb")


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_run_is_refused(case: str, make_recipe: Make, here: Path) -> None:
    sections, message = WRONG[case]
    recipe = make_recipe(**in_place(sections, here))
    with pytest.raises(UserError, match=message) as error:
        check_here(recipe)
    assert error.value.exit_code == 2
    assert len(str(error.value)) < 1000


def test_what_can_run_is_not(make_recipe: Make, here: Path) -> None:
    recipe = make_recipe()
    check_here(recipe)
    check_here(recipe, teaching=True)
    check_plan(recipe)
    check_here(make_recipe(student={"weights": "lora", "rank": 8}))
    assert not recipe.data.cache.exists()
    assert not (recipe.run_folder / "run.json").exists()


def test_room_for_all_that_will_be_written(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache and run on one disk: their sum counts, less what is there already."""
    recipe = make_recipe()
    found: list[list[places.Need]] = []
    monkeypatch.setattr(preflight, "check_space", found.append)
    check_here(recipe)
    cache, run = found[0]
    # 24 samples of 8 x 8 x 8 in fp32 and the embeddings of 12 prompts of 64 tokens
    assert cache.size == pytest.approx(24 * 8 * 8 * 8 * 4 + 12 * 64 * 32 * 4, rel=0.4)
    assert run.size > 10 * cache.size
    monkeypatch.undo()
    monkeypatch.setattr(places, "free_bytes", lambda _: cache.size + run.size - 1)
    with pytest.raises(UserError, match=r"data\.cache .* and output .* GiB will be written"):
        places.check_space([cache, run])
    cache.folder.mkdir(parents=True)
    (cache.folder / "shard").write_bytes(b"1")
    places.check_space([cache, run])


@pytest.mark.parametrize("command", [["teach"], ["distill", "--dry-run"], ["plan"], ["distill"]])
def test_every_command_begins_with_it(
    command: list[str], make_recipe: Make, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(make_recipe().to_yaml())
    result = CliRunner().invoke(app, [*command, str(path), "data.height=63"])
    assert "height must be a positive multiple" in str(result.exception)
    assert not (tmp_path / "cache").exists()


def test_what_no_machine_of_this_size_holds(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 tokens, 3 layers of width 64, two bytes a number: 6,144 for each sample of a turn."""
    recipe = make_recipe(training={"batch_size": 8})
    folder = ModelFolder.open(recipe.teacher.model)
    with torch.device("meta"):
        roles = build_roles(recipe, folder, device=torch.device("cpu"), load=load_weightless)
    held, turn = memory.least_bytes(recipe, folder, roles, processes=1)
    assert turn == 8 * 16 * 3 * 64 * 2
    smaller = make_recipe(training={"batch_size": 8, "micro_batch": 2})
    assert memory.least_bytes(smaller, folder, roles, processes=1) == (held, turn // 4)
    monkeypatch.setattr(memory, "machine_bytes", lambda _: held + turn)
    check_here(recipe)
    monkeypatch.setattr(memory, "machine_bytes", lambda _: held + turn - 1)
    check_here(recipe, teaching=True)
    with pytest.raises(
        UserError, match=r"^student\.weights, .* fake\.models: weights with what trains"
    ):
        check_here(recipe)
    assert check_here(smaller) is None
    monkeypatch.undo()
    huge = make_recipe(training={"batch_size": 1_000_000, "validation_samples": 4})
    with pytest.raises(UserError, match=r"^training\.batch_size: lower it, or set training\.micro"):
        monkeypatch.setattr(memory, "machine_bytes", lambda _: held + 2**30)
        check_here(huge)
