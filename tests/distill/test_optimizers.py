from __future__ import annotations

from collections.abc import Callable

import pytest

from twostep.data.cache.build import open_cache
from twostep.distill.optimizers import build_optimizers
from twostep.distill.trainer import Trainer
from twostep.recipe.schema import Recipe

NO_CRITIC = {"final": {"adversarial": 0.0}, "step1": {"adversarial": 0.0}}


@pytest.mark.parametrize("judged", [True, False])
def test_only_the_two_sides_of_a_game_do_without_momentum(
    make_recipe: Callable[..., Recipe], judged: bool
) -> None:
    recipe = make_recipe(score={"fit_turns": 1}, losses={} if judged else NO_CRITIC)
    roles = Trainer(recipe, open_cache(recipe)).roles
    found = {n: o.param_groups[0]["betas"] for n, o in build_optimizers(recipe, roles).items()}
    usual, game = (0.9, 0.99), (0.0 if judged else 0.9, 0.99)
    assert found == {"student": game, "critic": game, "fake": usual, "score": usual}
    own = make_recipe(training={"betas": [0.5, 0.9]}, fake={"betas": [0.0, 0.999]})
    assert own.betas["student"] == own.betas["critic"] == (0.5, 0.9)
    assert own.betas["fake"] == (0.0, 0.999)
