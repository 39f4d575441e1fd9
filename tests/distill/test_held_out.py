from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twostep.data.cache.build import open_cache
from twostep.data.cache.spec import CacheSpec
from twostep.distill.batches import order_of
from twostep.distill.held_out import HeldOut
from twostep.distill.trainer import Trainer
from twostep.distill.validation import Validator
from twostep.recipe.schema import Recipe

Make = Callable[..., Recipe]


def prompts_of(spec: CacheSpec, samples: Any) -> list[str]:
    return [spec.prompts[s // spec.samples_per_prompt] for s in samples]


@pytest.mark.parametrize("samples", [1, 2])
def test_no_turn_learns_from_a_prompt_of_the_validation(make_recipe: Make, samples: int) -> None:
    recipe = make_recipe(data={"samples_per_prompt": samples, "prompt_count": 24 // samples + 4})
    cache = open_cache(recipe)
    spec, held = cache.spec, HeldOut.of(recipe, cache.spec)
    asked = prompts_of(spec, held.samples)
    assert len(asked) == len(set(asked)) == recipe.training.validation_samples // 2
    order = order_of(recipe, cache)
    turns = range(2 * len(cache) // 4)
    for purpose in ("student", "critic", "score"):
        seen = {i for turn in turns for i in order.batch(turn, 4, purpose=purpose)}
        assert seen == set(range(len(cache))) - {
            i for i, p in enumerate(prompts_of(spec, range(len(cache)))) if p in asked
        }
    # The reference asks for other things, for as many different ones as it has images.
    others = prompts_of(spec, held.reference)
    assert not set(others) & set(asked)
    assert len(held.reference) == 2 * len(asked) == len(set(others))


def test_a_prompt_that_is_named_twice_is_held_out_with_both_samples(
    make_recipe: Make, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = [f"a {'very ' * (n // 2)}big dog" for n in range(24)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    recipe = make_recipe(data={"prompts": str(path)})
    spec = CacheSpec.of(recipe)
    held = HeldOut.of(recipe, spec)
    (learnt,) = held.training_samples()
    assert not set(prompts_of(spec, learnt)) & set(prompts_of(spec, held.samples))


def test_the_training_seed_changes_nothing_and_the_datas_does(make_recipe: Make) -> None:
    def held(**sections: Any) -> list[int]:
        recipe = make_recipe(**sections)
        return list(HeldOut.of(recipe, CacheSpec.of(recipe)).samples)

    assert held() == held(training={"seed": 5}) != held(data={"seed": 5})


def test_a_cache_of_three_prompts_holds_nothing_out(make_recipe: Make) -> None:
    recipe = make_recipe(data={"prompt_count": 3, "samples_per_prompt": 1})
    held = HeldOut.of(recipe, CacheSpec.of(recipe))
    assert held.training_samples() == [[0, 1, 2]]
    assert sorted(held.samples) == sorted(held.reference) == [0, 1, 2]


def test_every_channel_of_what_the_teacher_sees_counts_alike(make_recipe: Make) -> None:
    recipe = make_recipe()
    trainer = Trainer(recipe, open_cache(recipe))
    validator = Validator(
        recipe, trainer.roles, trainer.cache, device=trainer.device, world=trainer.world
    )
    spread = validator.reference.std(0)
    torch.testing.assert_close(spread, torch.ones_like(spread))
    torch.testing.assert_close(validator.reference.mean(0), torch.zeros_like(spread))
