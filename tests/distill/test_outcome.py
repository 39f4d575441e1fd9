"""What a run says of itself in the end; nothing that is not finite is written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from twostep.cli import app
from twostep.data.cache.build import open_cache
from twostep.data.cache.shards import CacheError
from twostep.distill.checkpoint import Progress
from twostep.distill.outcome import Diverged, Outcome, followed
from twostep.errors import ExportError, ModelError
from twostep.families.zimage_network import ZImageVelocity
from twostep.inference.generate import PictureRequest, generate
from twostep.inference.sampler import NotFiniteError, check_pictures
from twostep.models.folder import ModelFolder
from twostep.models.student import save_student
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import Placement

Make = Callable[..., Recipe]
SOUND = {"kernel_distance": 0.1, "latents_std": 1.0}


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({}, None),
        ({"best_metrics": {"kernel_distance": 0.39, "latents_std": 1.9}}, None),
        ({"best_metrics": {}, "start_distance": None}, None),
        ({"best_metrics": SOUND | {"kernel_distance": 0.41}}, "distance 0.41 from the teacher"),
        ({"best_metrics": SOUND | {"latents_std": 2.1}}, "spread 2.1 times"),
        ({"best_metrics": SOUND | {"latents_std": 0.4}}, "spread 0.4 times"),
        ({"score_start": 1.0, "score_loss": 1.9}, None),
        ({"score_start": 1.0, "score_loss": 2.1}, "loss rose from 1 to 2.1"),
        ({"score_start": 1.0, "score_loss": math.nan}, "loss rose from 1 to nan"),
    ],
)
def test_when_a_run_diverged(changes: dict[str, Any], phrase: str | None) -> None:
    usual: dict[str, Any] = {"turn": 5, "best_metrics": SOUND, "start_distance": 0.2}
    outcome = Outcome.of(Progress(**(usual | changes)))
    if phrase is None:
        outcome.check()
        return
    assert phrase in outcome.diverged[0]
    with pytest.raises(Diverged, match="begin a new run with lower rates") as error:
        outcome.check()
    assert error.value.exit_code == 3


def test_a_running_mean() -> None:
    assert followed(None, 3.0) == 3.0
    assert followed(1.0, 2.0) == pytest.approx(1.3)
    assert math.isnan(followed(1.0, math.nan))
    assert math.isnan(followed(math.nan, 1.0))


def test_a_diverged_run_ends_with_a_code_of_its_own(make_recipe: Make, tmp_path: Path) -> None:
    """Its student is there, and says on its card what became of it."""
    path = tmp_path / "r.yaml"
    recipe = make_recipe(
        losses={"warmup_turns": 2}, training={"turns": 2, "learning_rate": 3.0, "ema_decay": 0.0}
    )
    path.write_text(recipe.to_yaml())
    result = CliRunner().invoke(app, ["distill", str(path)])
    assert isinstance(result.exception, Diverged), result.output
    student = recipe.run_folder / "student"
    said = json.loads((recipe.run_folder / "run.json").read_text())["outcome"]
    assert said["turns"] == 2
    assert said["diverged"]
    card = (student / "README.md").read_text(encoding="utf-8")
    assert (
        f'DiffusionPipeline.from_pretrained("{recipe.name}/student", trust_remote_code=True)'
        in card
    )
    assert str(tmp_path) not in card
    assert "## What went wrong in training" in card
    assert said["diverged"][0] in card


@pytest.fixture
def poisoned(tiny_folder: Path, tmp_path: Path) -> Path:
    """A teacher with one NaN in its weights."""
    folder = tmp_path / "poisoned"
    shutil.copytree(tiny_folder, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    next(v for k, v in weights.items() if k.endswith("to_q.weight"))[0, 0] = math.nan
    save_file(weights, path, {"format": "pt"})
    return folder


def test_weights_that_are_not_finite_are_refused(
    poisoned: Path, make_recipe: Make, tmp_path: Path
) -> None:
    model = ModelFolder.open(poisoned)
    for read in (
        lambda: model.velocities(Placement.on("cpu")),
        lambda: model.stored_transformer("transformer"),
        lambda: open_cache(make_recipe(teacher={"model": str(poisoned)})),
        lambda: list(generate(PictureRequest(str(poisoned), ["a"], size=(32, 32)), tmp_path / "g")),
    ):
        with pytest.raises(ModelError, match=r"to_q\.weight holds values that are not finite"):
            read()
    assert not list((tmp_path / "cache").glob("shard-*"))
    assert not list((tmp_path / "g").iterdir())


def test_samples_that_are_not_finite_are_not_cached(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights may be finite, and what they give not."""
    forward = ZImageVelocity.forward

    def broken(self: Any, latents: torch.Tensor, *rest: Any) -> Any:
        found = forward(self, latents, *rest)
        found.velocity[-1, 0, 0, 0] = math.inf
        return found

    recipe = make_recipe()
    with monkeypatch.context() as patch:
        patch.setattr(ZImageVelocity, "forward", broken)
        with pytest.raises(CacheError, match=r"not finite for 1 of 4 prompts, such as '"):
            open_cache(recipe)
    assert not list((tmp_path / "cache").glob("shard-*"))
    cache = open_cache(recipe)
    shard = tmp_path / "cache" / "shard-00001.safetensors"
    tensors = load_file(shard)
    tensors["latents"][2, 0, 0, 0] = math.nan
    save_file(tensors, shard)
    cache._files.clear()
    assert len(cache.read([0, 1]).ids) == 2
    with pytest.raises(CacheError, match=r"shard-00001.*: sample 10 holds values"):
        cache.read([8, 10])


def test_what_is_not_finite_is_not_written(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="1 of 2 pictures, such as 'b'") as error:
        check_pictures(torch.tensor([0.0, math.nan])[:, None, None, None], ["a", "b"])
    assert error.value.exit_code == 1
    teacher = ModelFolder.open(tiny_folder)
    broken, sound = (teacher.stored_transformer("transformer") for _ in range(2))
    next(broken.parameters()).data.view(-1)[0] = 3.4e38  # finite in fp32, not in bf16
    with pytest.raises(ExportError, match=r"transformer_2 is not written: .* not finite"):
        save_student(
            teacher.base, sound, broken, schedule=teacher.schedule(), folder=tmp_path / "student"
        )
    assert list(tmp_path.iterdir()) == []
