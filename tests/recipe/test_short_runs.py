"""What a recipe need not say: the warm-up of a short run; and names of devices."""

from __future__ import annotations

import pytest

from twostep.errors import RecipeError
from twostep.recipe.schema import Recipe

BASE = {"name": "x", "teacher": {"model": "zoo:emoji-teacher"}}


@pytest.mark.parametrize(
    ("turns", "given", "warmup"),
    [
        (100, None, 50),
        (12, None, 6),
        (399, None, 199),
        (400, None, 200),
        (1000, None, 200),
        (100, 7, 7),
    ],
)
def test_the_default_warmup_leaves_turns_for_the_rest(
    turns: int, given: int | None, warmup: int
) -> None:
    losses = {} if given is None else {"warmup_turns": given}
    recipe = Recipe.parse({**BASE, "training": {"turns": turns}, "losses": losses})
    assert recipe.losses.warmup_turns == warmup
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe


def test_a_warmup_that_is_given_must_fit() -> None:
    with pytest.raises(RecipeError, match=r"warmup_turns \(200\) exceeds training.turns \(100\)"):
        Recipe.parse({**BASE, "training": {"turns": 100}, "losses": {"warmup_turns": 200}})


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1", "mps"])
def test_devices_have_names(name: str) -> None:
    assert Recipe.parse({**BASE, "training": {"device": name}}).training.device == name


def test_an_old_key_says_what_to_write() -> None:
    with pytest.raises(
        RecipeError, match=r"tensorboard: is now training.report_to: \[tensorboard\]"
    ):
        Recipe.parse({**BASE, "training": {"tensorboard": True}})
