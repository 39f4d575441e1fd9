"""The recipes of the repository are valid, and those for Z-Image run on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from twostep.data.cache.build import open_cache
from twostep.distill.trainer import Trainer
from twostep.inference.pipeline import TwoStepPipeline
from twostep.recipe.schema import Recipe
from twostep.zoo import recipe_names, recipe_path

RECIPES = [recipe_path(f"zoo:{name}") for name in recipe_names()]
Z_IMAGE = [path for path in RECIPES if path.name.startswith("z-image")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_valid_and_named_after_its_file(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.name == path.stem
    assert recipe.teacher.guidance_scale == recipe.score.guidance_scale == 0


@pytest.mark.parametrize("path", Z_IMAGE, ids=lambda p: p.stem)
def test_no_role_learns_far_faster_than_the_student(path: Path) -> None:
    """Fakes that outrun the student by an order of magnitude follow noise, not the student."""
    recipe = Recipe.load(path)
    assert 1 <= recipe.fake.learning_rate / recipe.training.learning_rate <= 5
    assert 1 <= recipe.score.learning_rate / recipe.training.learning_rate <= 5
    assert recipe.critic.learning_rate / recipe.training.learning_rate <= 20
    assert recipe.fake.models == "per_step"
    assert recipe.training.rate_warmup_turns > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", Z_IMAGE, ids=lambda p: p.stem)
def test_a_small_model_goes_through_it(path: Path, tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a picture of thing number {i}\n" for i in range(8)))
    recipe = Recipe.load(path, [
        f"teacher.model={tiny_folder}", f"data.prompts={prompts}", "data.prompt_count=8",
        f"data.cache={tmp_path}/cache", f"output={tmp_path}/runs", "data.height=32",
        "data.width=32", "data.other_sizes=[[32, 64]]", "data.samples_per_prompt=1",
        "critic.layers=[0, 1]", "critic.width=8", "training.batch_size=4",
        "training.turns=3", "losses.warmup_turns=1", "score.fit_turns=2",
        "training.critic_warmup_turns=1", "training.validation_samples=4", "training.device=cpu",
    ])  # fmt: skip
    assert len(Z_IMAGE) == 3
    student = Trainer(recipe, open_cache(recipe)).train()
    image = TwoStepPipeline.from_pretrained(student)("a thing", height=32, width=32).images[0]
    assert image.size == (32, 32)
